"""No step waits for the device: numbers are read every so many steps, and a refused step changes nothing by itself."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ether_diffusion.adapters.certify import Watch
from ether_diffusion.errors import TrainingFailed
from ether_diffusion.files import list_checkpoints
from ether_diffusion.training import dreambooth, optimizers
from ether_diffusion.training.averaging import Average
from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.optimizers import MaskedAdamW, make_optimizer
from ether_diffusion.training.sharding import Copies, to_channels_last
from ether_diffusion.training.step_log import StepLog
from support.runs import assert_same_run, metrics

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]
SHORT = ("data.prior=null", "training.ema_decay=0.5")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a device whose AdamW is fused."""
    monkeypatch.setattr(optimizers, "FUSED", ("cpu",))


class HostReads(TorchDispatchMode):
    """Counts what would make a host wait for a device: scalars, lists and arrays made of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, self.depth = 0, 0
        for name in ("tolist", "numpy", "cpu", "__array__"):
            real = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, lambda *a, real=real, **k: self._counted(real, *a, **k))

    def _counted(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += self.depth
        return real(*args, **kwargs)

    def __enter__(self) -> HostReads:
        self.depth = 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.depth = 0
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def test_the_counter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    with HostReads(monkeypatch) as reads:
        x.sum().add(1)
        assert reads.count == 0
        for number, wait in enumerate((lambda: x[0].item(), lambda: bool(x[0]), x.tolist, x.cpu, x.numpy), 1):
            wait()
            assert reads.count == number


@pytest.mark.parametrize("options", [(), ("training.gradient_accumulation=2", "training.min_snr_gamma=5")])
def test_between_two_reads_no_step_waits_for_the_device(
    fused: None, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Samples are made on the host, whose numbers cost no wait: they are made before the count."""
    load, read, seen = Trainer._batches, StepLog.read, []
    monkeypatch.setattr(Trainer, "_batches", lambda self, stop_at: (each for each in list(load(self, stop_at))))

    def counted(log: StepLog) -> Iterator[Any]:
        before = reads.count
        with reads:
            numbers = list(read(log))
        seen.append((before, reads.count))
        yield from numbers

    monkeypatch.setattr(StepLog, "read", counted)
    steps = ("training.steps=9", "training.log_every=4")
    config = make_config(tmp_path / "run", *SHORT, "training.checkpoint_every=100", *steps, *options)
    reads = HostReads(monkeypatch)
    prepare = dreambooth.DreamBoothTask.prepare

    def counted_prepare(task: Any, batch: Any) -> Any:
        task.encoders.text(batch["prompts"])  # the one prompt is encoded once, and its ids come from the host
        with reads:
            return prepare(task, batch)

    def within(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with reads:
                return real(*args, **kwargs)

        return run

    monkeypatch.setattr(dreambooth.DreamBoothTask, "prepare", counted_prepare)
    for owner, name in (
        (Trainer, "_means"),
        (Trainer, "_update"),
        (Watch, "observe"),
        (Copies, "gradients"),
        (nn.utils, "clip_grad_norm_"),
    ):
        monkeypatch.setattr(owner, name, within(getattr(owner, name)))
    dreambooth.run(config)
    assert seen == [(0, 1), (1, 2), (2, 3)]  # after steps 4, 8 and 9: one copy each


def test_the_steps_between_reads_are_all_in_the_metrics(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, every in (("each", 1), ("third", 3)):
        options = (*SHORT, "training.steps=5", f"training.log_every={every}", "training.checkpoint_every=5")
        dreambooth.run(make_config(tmp_path / name, *options))
    assert_same_run(tmp_path / "each", tmp_path / "third", "step-000005")
    rows = [json.loads(line) for line in (tmp_path / "third/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["seconds"] > 0 for row in rows)


def state_of(trainer: Trainer) -> list[Tensor]:
    """Weights, the optimiser's tensors and the average."""
    states = [trainer.optimizer.optimizer.state[p] for p in trainer.trained.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    assert trainer.average is not None
    return copy.deepcopy([*(p.detach() for p in trainer.trained.values()), *tensors, *trainer.average.shadow_params])


@pytest.mark.parametrize(
    ("optimizer", "is_fused"), [("adamw", False), ("adamw", True), ("adamw_8bit", False), ("prodigy", False)]
)
@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_changes_no_bit(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    is_fused: bool,
    bad: float,
) -> None:
    """At step 3 of 6, in the first of two forward passes; numbers are read after step 5."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    if is_fused:
        monkeypatch.setattr(optimizers, "FUSED", ("cpu",))
    passes, states, gradients, update = [], {}, Copies.gradients, Trainer._update

    def poisoned(self: Copies, batch: Any, parts: int, last: bool) -> Any:
        losses = gradients(self, batch, parts, last)
        passes.append(batch)
        if len(passes) == 5:
            weight = next(p for p in self.module.parameters() if p.grad is not None)
            weight.grad.view(-1)[0] = bad
        return losses

    def recorded(self: Trainer, accepted: Tensor) -> None:
        before = state_of(self)
        update(self, accepted)
        states[len(passes) // 2] = before, state_of(self)

    monkeypatch.setattr(Copies, "gradients", poisoned)
    monkeypatch.setattr(Trainer, "_update", recorded)
    every = ("training.log_every=5", "training.checkpoint_every=100", "training.gradient_accumulation=2")
    config = make_config(tmp_path / "run", *SHORT, *every, "training.steps=6", f"training.optimizer={optimizer}")
    with pytest.raises(TrainingFailed, match=rf"The gradient's norm is {bad} at step 3\. There is no checkpoint yet"):
        dreambooth.run(config)
    assert list(states) == [1, 2, 3, 4, 5]
    for step, (before, after) in states.items():
        same = len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert same == (step == 3), step
        assert all(tensor.isfinite().all() for tensor in after)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert not list_checkpoints(tmp_path / "run/checkpoints")


def test_losses_are_read_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite at step 1: neither the checkpoint nor the images of step 2 are made."""
    gradients, validated = Copies.gradients, []

    def broken(self: Copies, batch: Any, parts: int, last: bool) -> Any:
        losses = gradients(self, batch, parts, last)
        return {name: value * math.nan for name, value in losses.items()}

    monkeypatch.setattr(Copies, "gradients", broken)
    monkeypatch.setattr(Trainer, "_validate", lambda self, step, stop: validated.append(step))
    for name, option in (("saved", "training.checkpoint_every=2"), ("shown", "validation.every=2")):
        config = make_config(
            tmp_path / name, *SHORT, "training.steps=5", "training.log_every=100", "validation.prompts=[a toy]", option
        )
        with pytest.raises(TrainingFailed, match=r"The loss is nan at step 1\."):
            dreambooth.run(config)
        assert not list_checkpoints(tmp_path / name / "checkpoints")
    assert validated == [0, 0]  # before training


def test_an_interrupted_step_logs_those_before_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, k, batches: step(self, k, batches) if k < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dreambooth.run(make_config(tmp_path / "run", *SHORT, "training.steps=5", "training.log_every=100"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_gradient_scaler_refuses_an_overflow_without_a_wait(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = make_optimizer(TrainingSettings(steps=1), [{"params": [weight], "lr": 0.1}])
    assert isinstance(optimizer, MaskedAdamW)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflows in (False, True, False):
        before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
        with HostReads(monkeypatch) as reads:
            scaler.scale(weight.square().sum() * (torch.inf if overflows else 1.0)).backward()
            scaler.unscale_(optimizer)
            optimizer.refused = torch.zeros(())
            scaler.step(optimizer)
            scaler.update()
            assert reads.count == 0
        optimizer.zero_grad()
        after = [weight.detach(), *optimizer.state[weight].values()]
        if overflows:
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        else:
            assert not torch.equal(before[0], after[0])
    assert scaler.get_scale() == 2.0
    assert optimizer.state[weight]["step"] == 2


def test_the_cpu_steps_with_torchs_plain_adamw() -> None:
    """Whose bits runs on the CPU have had from the start; the fused one rounds in another order."""
    group = {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}
    optimizer = make_optimizer(TrainingSettings(steps=1), [group], torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is None


def test_the_masked_step_is_torchs_fused_adamw(fused: None) -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    settings = TrainingSettings(steps=1)
    ours = make_optimizer(settings, [{"params": weights[:1], "lr": 0.1}])
    assert isinstance(ours, MaskedAdamW)
    theirs = torch.optim.AdamW(weights[1:], lr=0.1, betas=settings.betas, eps=settings.epsilon, fused=True)
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = weight.detach().sin()
            if isinstance(optimizer, MaskedAdamW):
                optimizer.refused = torch.zeros(())
            optimizer.step()
    assert torch.equal(*weights)


def test_the_average_is_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    weights = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 2))]
    ours, theirs = Average(weights, decay=0.3), EMAModel(weights, decay=0.3)
    for _ in range(4):
        for weight in weights:
            weight.data += torch.randn_like(weight)
        ours.update(weights, torch.tensor(True))
        theirs.step(weights)
        assert all(torch.equal(*pair) for pair in zip(ours.shadow_params, theirs.shadow_params, strict=True))
    kept = [shadow.clone() for shadow in ours.shadow_params]
    ours.update([nn.Parameter(weight + 1) for weight in weights], torch.tensor(False))
    assert all(torch.equal(*pair) for pair in zip(ours.shadow_params, kept, strict=True))


def test_frozen_convolutions_in_channels_last_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).double()
    model[0].requires_grad_(False)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = model(x)
    to_channels_last(model)
    first, second = (model.get_parameter(f"{number}.weight") for number in (0, 1))
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert second.is_contiguous()
    torch.testing.assert_close(model(x), before)

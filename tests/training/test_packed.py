"""Runs that train in shared passes end as they would alone; none sees another's numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ether_diffusion.adapters.attach import attach, sharing_copy, trainable_parameters
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.pictures import save_png
from ether_diffusion.training import dreambooth, many_runs, task, training_base
from ether_diffusion.training.packed import Pack
from ether_diffusion.training.schedule import make_plan
from support.narrow_base import narrow_base
from support.runs import assert_same_run, losses, metrics, stopped_after, trained_weights

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]
RUNS = (
    ("data.instance_dir=builtin:robot", "data.class_name=toy", "seed=1"),
    ("data.instance_dir=builtin:party_cat", "data.class_name=cat", "seed=2", "training.learning_rate=0.01"),
    ("data.instance_dir=builtin:robot", "data.class_name=toy", "seed=3", "data.prior=null"),  # half as many samples
)
RANDOM = (
    "training.noise_offset=0.1",
    "data.horizontal_flip=true",
    "data.caption_dropout=0.3",
    "training.gradient_accumulation=2",
    "training.ema_decay=0.5",
    "training.schedule=cosine",
    "training.min_snr_gamma=5",
)
ETHER = ("adapter={method: ether, num_blocks: 4}", "training.learning_rate=0.006")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a base whose steps take milliseconds."""
    folder = tmp_path_factory.mktemp("narrow")
    narrow_base().save_pretrained(folder / "base")
    for k in range(2):
        save_png(Image.new("RGB", (20, 24), (40 + 90 * k, 200, 120)), folder / f"class/{k}.png")
    return (f"base_model={folder / 'base'}", "data.resolution=16", f"data.prior.class_dir={folder / 'class'}")


@pytest.fixture
def in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (task, training_base):
        monkeypatch.setattr(module, "precision", lambda accelerator: torch.float64)


def configs(make_config: MakeConfig, folder: Path, *common: str, runs: Sequence[Sequence[str]] = RUNS) -> list[Any]:
    return [make_config(folder / f"run{k}", *common, *own) for k, own in enumerate(runs)]


def distance(one: dict[str, Tensor], two: dict[str, Tensor], least: float = 0) -> float:
    """The largest difference of a number, relative to the largest of its tensor, or to this share of all tensors'."""
    assert one.keys() == two.keys()
    sizes = {key: float(tensor.abs().max()) for key, tensor in two.items()}
    floor = least * max(sizes.values())
    return max(float((one[key] - two[key]).abs().max()) / max(sizes[key], floor) for key in one)


@pytest.mark.usefixtures("in_double_precision")
@pytest.mark.parametrize(
    ("method", "steps", "most"),
    [
        pytest.param((), 1, 1e-10, id="ether_plus-1"),
        pytest.param((), 20, 1e-6, id="ether_plus-20"),
        pytest.param(ETHER, 1, 1e-10, id="ether-1"),
        pytest.param(ETHER, 20, 1e-6, id="ether-20", marks=pytest.mark.slow),
    ],
)
def test_in_double_precision_each_run_is_the_one_alone(
    make_config: MakeConfig, small: tuple[str, ...], tmp_path: Path, method: tuple[str, ...], steps: int, most: float
) -> None:
    """To so much of each tensor's largest number, with all that is random on."""
    common = (*small, *method, *RANDOM, f"training.steps={steps}")
    dreambooth.run_many(configs(make_config, tmp_path / "together", *common))
    for k, config in enumerate(configs(make_config, tmp_path / "alone", *common)):
        dreambooth.run(config)
        packed, alone = tmp_path / "together" / f"run{k}", tmp_path / "alone" / f"run{k}"
        assert next(iter(trained_weights(alone).values())).dtype == torch.float64
        assert distance(trained_weights(packed), trained_weights(alone)) < most
        assert losses(packed) == pytest.approx(losses(alone), rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_first_gradients_are_those_of_each_run_alone(
    make_config: MakeConfig, tmp_path: Path, checkpointing: bool
) -> None:
    """On `tiny` in single precision: to 1e-4 of each tensor's largest entry. Other runs add nothing, finite or not.

    Gradients far below those of other tensors are what is left of terms that cancel, and their rounding is larger.
    """
    together, alone = (
        gradients(configs(make_config, tmp_path, "data.prior=null", runs=RUNS[:2]), packed, checkpointing)
        for packed in (True, False)
    )
    for own, expected in zip(together, alone, strict=True):
        assert all(bool(gradient.abs().max() > 0) for gradient in expected.values())
        assert distance(own, expected, least=0.1) < 1e-4
    spoilt = gradients(configs(make_config, tmp_path, "data.prior=null", runs=RUNS[:2]), True, checkpointing, spoil=0)
    assert not any(bool(gradient.isfinite().any()) for gradient in spoilt[0].values())
    assert distance(spoilt[1], alone[1], least=0.1) < 1e-4


def test_first_gradients_in_single_precision_are_as_exact_as_those_alone(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against double precision both are wrong by 1e-2 of the largest entry in the smallest tensors, and by 2e-5 in half
    of them."""
    own = configs(make_config, tmp_path, "data.prior=null", runs=RUNS[:2])
    together, alone = (gradients(own, packed, False) for packed in (True, False))
    for module in (task, training_base):
        monkeypatch.setattr(module, "precision", lambda accelerator: torch.float64)
    exact = gradients(own, False, False, dtype=torch.float64)
    wrong, wrong_alone = (sorted(errors(found, exact)) for found in (together, alone))
    assert wrong[-1] < 4 * wrong_alone[-1]
    assert wrong[len(wrong) // 2] < 1.5 * wrong_alone[len(wrong) // 2]


def errors(found: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> list[float]:
    """Of each tensor of each run."""
    pairs = [(one[key], two[key]) for one, two in zip(found, exact, strict=True) for key in two]
    return [float((one - two).abs().max() / two.abs().max()) for one, two in pairs]


def gradients(
    configs: Sequence[Any], packed: bool, checkpointing: bool, spoil: int = -1, dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    """Each run's gradients of its first batch; the inputs of run `spoil` are NaN."""
    accelerator, base = Accelerator(), load_base("tiny")
    trainers, adapted = list[Any](), list[Any]()
    unet: Any = sharing_copy(base.unet).train()
    for config in map(dreambooth.resolve, configs):
        adapted.append(base.with_denoiser(sharing_copy(base.unet)))
        attach(adapted[-1].unet, config.adapter, config.seed)
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, vector in trainable_parameters(adapted[-1].unet).items():
                if name.endswith(".v"):  # off the start, where the output does not depend on it alone
                    vector += 0.02 * torch.randn(vector.shape, generator=noise)
    for config, own in zip(map(dreambooth.resolve, configs), adapted, strict=True):
        own.unet.to(dtype)
        run = dreambooth.DreamBoothTask(config, None, resumed=False)
        plan = make_plan(config.training, run.samples_per_epoch)
        run.build(own, plan, accelerator)
        trainers.append(SimpleNamespace(task=run, plan=plan, accelerator=accelerator, use_whole=lambda *_: None))
    batches = {}
    for k, trainer in enumerate(trainers):
        batches[k] = trainer.task.prepare(trainer.task.collate([trainer.task.dataset[0]]))
        if k == spoil:
            batches[k]["noisy_latents"] = torch.full_like(batches[k]["noisy_latents"], torch.nan)
    if packed:
        if checkpointing:
            unet.enable_gradient_checkpointing()
        Pack(unet, trainers[0].task.config.adapter.peft_config(), trainers, accelerator).gradients(batches)
    else:
        for k, trainer in enumerate(trainers):
            trainer.task.module(batches[k])["loss"].backward()
    found = [dict(trainer.task.module.named_parameters()) for trainer in trainers]
    return [{name: p.grad for name, p in own.items() if p.grad is not None} for own in found]


def test_each_run_leaves_the_folder_that_it_leaves_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same files; config, checkpoints and images of its own; losses as alone; a part of the runs at a time."""
    common = ("training.steps=2", "training.checkpoint_every=1", "training.tracker=tensorboard")
    sampled = (*common, "validation.prompts=[a qwe toy]", "validation.every=2")
    reports = dreambooth.run_many(configs(make_config, tmp_path / "together", *sampled), max_together=2)
    assert [report.steps_taken for report in reports] == [2, 2, 2]
    for k in range(len(RUNS)):
        config = configs(make_config, tmp_path / "alone", *sampled)[k]
        dreambooth.run(config)
        packed, alone = tmp_path / "together" / f"run{k}", tmp_path / "alone" / f"run{k}"
        files = [sorted(file_names(run)) for run in (packed, alone)]
        assert files[0] == files[1]
        texts = [(run / "config.yaml").read_text().replace(str(run), "") for run in (packed, alone)]
        assert texts[0] == texts[1]
        assert trained_weights(packed).keys() == trained_weights(alone).keys()
        # AdamW's first step amplifies the rounding of the smallest gradients to the size of the rate.
        for own, other, most in zip(metrics(packed), metrics(alone), (1e-4, 5e-2), strict=True):
            assert own == pytest.approx(other, rel=most)


def file_names(run: Path) -> list[str]:
    """All files by their paths in the run; a tracker's carry times in their names."""
    paths = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    return ["logs" if path.parts[0] == "logs" else str(path) for path in paths]


def test_a_run_that_diverges_is_set_aside_and_the_others_end_as_alone(
    make_config: MakeConfig,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_double_precision: None,
) -> None:
    common = (*small, "training.steps=4", "training.checkpoint_every=1")
    prepare, batches = dreambooth.DreamBoothTask.prepare, []

    def prepare_and_spoil(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = prepare(self, batch)
        if self.config.seed == 2:
            batches.append(batch)
            if len(batches) == 3:
                prepared["noisy_latents"] = torch.full_like(prepared["noisy_latents"], torch.nan)
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.DreamBoothTask, "prepare", prepare_and_spoil)
        with pytest.raises(TrainingFailed, match=r"run 2 .*at step 3(.|\n)*1 of 3 runs failed"):
            dreambooth.run_many(configs(make_config, tmp_path / "together", *common))
    assert "Set aside: run 2 " in capsys.readouterr().out
    checkpoints = tmp_path / "together/run1/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000001", "step-000002"]
    for k in (0, 2):
        config = configs(make_config, tmp_path / "alone", *common)[k]
        dreambooth.run(config)
        packed = trained_weights(tmp_path / "together" / f"run{k}")
        assert distance(packed, trained_weights(config.output_dir)) < 1e-8


@pytest.mark.parametrize("when", ["prepare", "validate"])
def test_interrupted_runs_resume_exactly(
    make_config: MakeConfig, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """All stop after the same step, wherever the signal comes, and end bitwise as if nothing had happened."""
    common = (*small, *RANDOM, "training.steps=4", "validation.prompts=[a qwe toy]", "validation.every=2")
    dreambooth.run_many(configs(make_config, tmp_path / "once", *common))
    original, calls = getattr(dreambooth.DreamBoothTask, when), []
    # The second run, in the first part of its third step; or at its images of step 2, when the first has made its own.
    moment = {"prepare": 5, "validate": 2}[when]

    def interrupted(self: Any, *args: Any) -> Any:
        if self.config.seed == 2:
            calls.append(args)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.DreamBoothTask, when, interrupted)
        with pytest.raises(Interrupted, match=r"training\.resume=true resumes all runs") as stopped:
            dreambooth.run_many(configs(make_config, tmp_path / "twice", *common))
    assert stopped.value.signum == signal.SIGTERM
    step = {"prepare": 3, "validate": 2}[when]
    for k in range(len(RUNS)):
        assert [path.name for path in (tmp_path / f"twice/run{k}/checkpoints").iterdir()] == [f"step-{step:06d}"]
    dreambooth.run_many(configs(make_config, tmp_path / "twice", *common, "training.resume=true"))
    for k in range(len(RUNS)):
        once, twice = (tmp_path / name / f"run{k}" for name in ("once", "twice"))
        assert_same_run(once, twice, "step-000004")
        for sheet in ("step-000000.png", "step-000002.png", "step-000004.png"):
            assert (once / "samples" / sheet).read_bytes() == (twice / "samples" / sheet).read_bytes()


@pytest.mark.parametrize("step", [1, 3])
def test_runs_that_a_kill_left_at_different_checkpoints_resume_from_the_one_before(
    make_config: MakeConfig, small: tuple[str, ...], tmp_path: Path, step: int
) -> None:
    """Where it came while they wrote a checkpoint: they take the same passes again, and end bit for bit the same."""
    common = (*small, "training.steps=4", "training.checkpoint_every=1", "training.keep_states=4")
    dreambooth.run_many(configs(make_config, tmp_path / "once", *common))
    for k in range(len(RUNS)):
        left = stopped_after(tmp_path / f"once/run{k}", step - (k > 0), tmp_path / f"twice/run{k}")
        shutil.rmtree(left / "adapter")
        lines = (left / "metrics.jsonl").read_text().splitlines(keepends=True)
        (left / "metrics.jsonl").write_text("".join(lines[:step]))
    dreambooth.run_many(configs(make_config, tmp_path / "twice", *common, "training.resume=true"))
    for k in range(len(RUNS)):
        assert_same_run(tmp_path / f"once/run{k}", tmp_path / f"twice/run{k}", "step-000004")


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw_8bit"])
def test_each_run_has_an_optimiser_of_its_own(
    make_config: MakeConfig, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Prodigy's estimate of a rate is a run's own, and blocks of quantised moments hold one run's numbers alone."""
    if exact := optimizer == "prodigy":  # bitsandbytes has no double precision
        for module in (task, training_base):
            monkeypatch.setattr(module, "precision", lambda accelerator: torch.float64)
    common = (*small, f"training.optimizer={optimizer}", "training.steps=3")
    runs = [own[:3] for own in RUNS[:2]]
    dreambooth.run_many(configs(make_config, tmp_path / "together", *common, runs=runs))
    for k, config in enumerate(configs(make_config, tmp_path / "alone", *common, runs=runs)):
        dreambooth.run(config)
        packed, alone = (tmp_path / name / f"run{k}" for name in ("together", "alone"))
        assert distance(trained_weights(packed), trained_weights(alone)) < (1e-6 if exact else 1e-2)
        manifests = [run / "checkpoints/step-000003/checkpoint.json" for run in (packed, alone)]
        groups = [json.loads(manifest.read_text())["optimizer_groups"][0] for manifest in manifests]
        assert groups[0].get("d", 0) == pytest.approx(groups[1].get("d", 0), rel=1e-6)


def test_what_must_not_differ_is_refused_by_name(make_config: MakeConfig, tmp_path: Path) -> None:
    common = make_config(tmp_path / "a")
    others = {
        "adapter.method": "adapter.method=ether",
        "training.steps": "training.steps=7",
        "training.batch_size": "training.batch_size=3",
        "data.resolution": "data.resolution=32",
        "adapter.target": "adapter.target=linear",
        "training.weight_decay": "training.weight_decay=0.5",
    }
    for key, override in others.items():
        with pytest.raises(UserError, match=rf"^run 2: {key} is .*in run 1\n"):
            dreambooth.run_many([common, make_config(tmp_path / "b", override)])
    with pytest.raises(UserError, match=r"run 2: base_model is 'other'"):
        dreambooth.run_many([common, make_config(tmp_path / "b", "base_model=other")])
    with pytest.raises(UserError, match=r"run 2: output_dir .*a is run 1's; give each run its own"):
        dreambooth.run_many([common, common])
    with pytest.raises(UserError, match=r"^adapter\.method: lora runs do not train together"):
        dreambooth.run_many([make_config(tmp_path / name, "adapter.method=lora") for name in "ab"])
    with pytest.raises(UserError, match=r"^adapter\.text_encoder: true"):
        dreambooth.run_many([make_config(tmp_path / name, "adapter.text_encoder=true") for name in "ab"])
    with pytest.raises(UserError, match=r"^training\.compile: True"):
        dreambooth.run_many([make_config(tmp_path / name, "training.compile=true") for name in "ab"])
    assert not list(tmp_path.iterdir())


def test_a_fault_of_one_run_names_it_and_nothing_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run 2 \(.*/b\): .*nowhere"):
        dreambooth.run_many([make_config(tmp_path / "a"), make_config(tmp_path / "b", "data.instance_dir=nowhere")])
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_how_many_fit(
    make_config: MakeConfig,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dreambooth.run_many(configs(make_config, tmp_path, *small), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if " at once: " in line] == ["1 at once", "2 at once", "3 at once"]
    assert lines[-1] == "Dry run: all 3 runs fit into memory at once. Nothing was written."
    # Of runs that take a GiB each, two and a half fit into what is left next to the two that were measured.
    peaks = iter(size << 30 for size in (10, 10, 11, 11))
    monkeypatch.setattr("ether_diffusion.training.loop.peak_memory", lambda device: next(peaks))
    monkeypatch.setattr(many_runs, "_free_memory", lambda device: int(2.5 / many_runs.ROOM * 2**30))
    dreambooth.run_many(configs(make_config, tmp_path, *small, runs=RUNS * 2), dry_run=True, max_together=2)
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("Dry run: 4 of 6 runs fit into memory: --max-together 4.")
    )
    assert not list(tmp_path.iterdir())

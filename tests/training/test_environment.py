"""The process that trains: a GPU that is missing, memory that runs out, signals where work can be done again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from ether_diffusion.errors import Interrupted, TrainingFailed, UserError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.environment import out_of_memory_hint as hint
from ether_diffusion.training.environment import start_accelerator
from support.runs import assert_same_run


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `accelerate launch --config_file configs/accelerate/one_gpu.yaml` on a machine without a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("cuda", "visible", "reason"),
    [
        (None, None, r"is a build for CPUs"),
        ("12.8", "", r"CUDA_VISIBLE_DEVICES='' hides all"),
        ("12.8", "-1", r"CUDA_VISIBLE_DEVICES='-1' hides all"),
        ("12.8", None, r"the driver \(nvidia-smi\) shows none"),
    ],
)
def test_a_launch_for_a_gpu_without_one_is_refused_with_the_reason(
    launched: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, visible: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=rf"no GPU can be used: .*{reason}.*training\.allow_cpu=true"):
        start_accelerator(TrainingSettings(steps=1), tmp_path, dry_run=True)


def test_several_processes_without_as_many_gpus_are_refused(
    launched: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with multi_gpu.yaml, for which accelerate states nothing: each process would train for itself."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"asks for a GPU, but no GPU can be used: .*training\.allow_cpu=true"):
        start_accelerator(TrainingSettings(steps=1), tmp_path, dry_run=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"starts 2 processes, one a GPU, but only 1 can be used: set its num_proc"):
        start_accelerator(TrainingSettings(steps=1), tmp_path, dry_run=True)


@pytest.mark.parametrize("way", ["training.allow_cpu", "--cpu"])
def test_the_cpu_is_used_where_it_is_asked_for(
    launched: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    if way == "--cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    settings = TrainingSettings(steps=1, allow_cpu=way != "--cpu")
    assert start_accelerator(settings, tmp_path, dry_run=True).device.type == "cpu"
    assert ("Note:    training on the CPU" in capsys.readouterr().out) == (way != "--cpu")


def fill_memory(settings: TrainingSettings) -> None:
    with hint(settings, "no"):
        torch.empty(2**55, dtype=torch.uint8)


def test_memory_of_the_machine_gets_the_same_advice_as_that_of_a_gpu() -> None:
    settings, advice = TrainingSettings(steps=1, batch_size=4), r"training\.batch_size=1 with"
    with pytest.raises(TrainingFailed, match=rf"^Out of memory \(.*DefaultCPUAllocator.*{advice}"):
        fill_memory(settings)
    with pytest.raises(TrainingFailed, match=rf"^Out of memory \(MemoryError\)\. Try .*{advice}"), hint(settings, "no"):
        raise MemoryError
    failed = TrainingFailed("Out of memory (DefaultCPUAllocator: can't allocate memory)")
    with pytest.raises(TrainingFailed) as caught, hint(settings, "no"):
        raise failed
    assert caught.value is failed


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM, signal.SIGINT), pytest.param((signal.SIGINT, signal.SIGTERM), marks=pytest.mark.slow)],
    ids=lambda signals: ", ".join(one.name for one in signals),
)
def test_a_signal_during_validation_is_obeyed_at_once_and_loses_nothing(
    make_config: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: tuple[signal.Signals, ...],
) -> None:
    """The first signal comes before the first step, the second after a step."""
    settings = ("validation.prompts=[a qwe toy]", "validation.every=2", "data.prior=null", "training.steps=4")
    validate, stops = dreambooth.DreamBoothTask.validate, dict(zip((0, 2), signals, strict=True))

    def stopped(self: Any, step: int, path: Path) -> dict[str, float]:
        if step in stops:
            os.kill(os.getpid(), stops.pop(step))
            raise AssertionError("the signal came too late")
        return validate(self, step, path)

    dreambooth.run(make_config(tmp_path / "once", *settings))
    monkeypatch.setattr(dreambooth.DreamBoothTask, "validate", stopped)
    messages = (r"^Stopped after step 0 of 4\.", r"^Stopped after step 2 of 4, with a checkpoint\.")
    for signum, message in zip(signals, messages, strict=True):
        with pytest.raises(Interrupted, match=message) as caught:
            dreambooth.run(make_config(tmp_path / "run", *settings, "training.resume=true"))
        assert caught.value.signum == signum
    dreambooth.run(make_config(tmp_path / "run", *settings, "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "run", "step-000004")
    sheets = [sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("once", "run")]
    assert sheets[0] == sheets[1]


def test_a_signal_while_images_are_encoded_is_obeyed_at_once(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(dreambooth.DreamBoothTask, "fill_caches", stop)
    with pytest.raises(Interrupted, match="before the first step"):
        dreambooth.run(make_config(tmp_path / "run", "data.prior=null"))
    assert not (tmp_path / "run").exists()

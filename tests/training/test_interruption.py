"""A run that a signal interrupts and that is resumed ends bitwise the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.errors import Interrupted
from ether_diffusion.training import controllable, dreambooth
from support.runs import assert_same_run

STEPS = ("training.steps=3", "training.schedule=cosine", "training.warmup_steps=2", "validation.every=3")
# Everything that uses random numbers is switched on. By task: overrides, and the batch at which the signal comes.
CASES = {
    "dreambooth": (
        (
            "training.gradient_accumulation=3",
            "training.workers=2",
            "training.noise_offset=0.1",
            "data.horizontal_flip=true",
            "data.caption_dropout=0.3",
            "validation.prompts=[a qwe toy]",
        ),
        3 + 2,  # the second of three parts of the second step
    ),
    "controllable": (
        (
            "training.gradient_accumulation=2",
            "training.ema_decay=0.5",
            "training.workers=1",
            "data.crop=random",
            "data.horizontal_flip=true",
            "data.caption_dropout=0.4",
            "validation.images=1",
        ),
        2 + 1,  # the first of two parts of the second step
    ),
}
PRIOR = "data.prior=null"
TASKS: dict[str, Any] = {"dreambooth": dreambooth, "controllable": controllable}
TRAINED = {"dreambooth": dreambooth.DreamBoothTask, "controllable": controllable.ControllableTask}


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("dreambooth", "ether_plus"),
        ("controllable", "ether_plus"),
        pytest.param("controllable", "none", marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_mid_epoch_and_mid_accumulation_ends_bitwise_the_same(
    make_config: Callable[..., Any],
    make_controllable: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    method: str,
) -> None:
    """The same weights, losses, optimiser state and validation images."""
    overrides, batch_of_signal = CASES[task]
    make = make_config if task == "dreambooth" else make_controllable
    run, common = TASKS[task].run, (f"adapter={{method: {method}}}", *STEPS, *overrides)
    run(make(tmp_path / "once", *common))
    prepare, batches = TRAINED[task].prepare, []

    def prepare_and_interrupt(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batches.append(batch)
        if len(batches) == batch_of_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TRAINED[task], "prepare", prepare_and_interrupt)
        with pytest.raises(Interrupted, match=r"after step 2 of 3.*training\.resume=true") as stopped:
            run(make(tmp_path / "twice", *common))
    assert stopped.value.signum == signal.SIGTERM
    assert (tmp_path / "twice/checkpoints/step-000002/optimizer.safetensors").exists()
    run(make(tmp_path / "twice", *common, "training.resume=latest"))
    assert (tmp_path / "once/adapter").exists() == (method != "none")
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000003")
    images = [(tmp_path / name / "samples/step-000003.png").read_bytes() for name in ("once", "twice")]
    assert images[0] == images[1]


def test_a_sheet_that_a_stop_prevented_is_made_when_the_run_resumes(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "validation.prompts=[a qwe toy]",
        "validation.every=2",
        "training.checkpoint_every=2",
        "data.prior=null",
    )
    dreambooth.run(make_config(tmp_path / "once", *settings, "training.steps=4"))
    validate = dreambooth.DreamBoothTask.validate

    def stopped(self: Any, step: int, path: Path) -> dict[str, float]:
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt
        return validate(self, step, path)

    stops = [0, 2, 4]
    monkeypatch.setattr(dreambooth.DreamBoothTask, "validate", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            dreambooth.run(make_config(tmp_path / "run", *settings, "training.steps=4", "training.resume=true"))
    dreambooth.run(make_config(tmp_path / "run", *settings, "training.steps=4", "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "run", "step-000004")
    for step in (0, 2, 4):
        sheet = f"samples/step-{step:06d}.png"
        assert (tmp_path / "run" / sheet).read_bytes() == (tmp_path / "once" / sheet).read_bytes()

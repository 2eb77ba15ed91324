"""Laws of a run that hold for every method of the table: learning, exact resume, files, images, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.errors import UserError
from ether_diffusion.generation import (
    ControllableSampling,
    Job,
    Sampling,
    jobs_for,
    load_pipeline,
    sample_images,
)
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import controllable, dreambooth
from support.runs import losses, same, weights

TASKS = {"dreambooth": dreambooth, "controllable": controllable}
TRAINED: dict[str, Any] = {"dreambooth": dreambooth.DreamBoothTask, "controllable": controllable.ControllableTask}
QUICK = {("oft", "dreambooth"), ("vera", "controllable")}  # the others take as long, each
ALIKE = {"dora", "boft", "hra", "delora"}
"""Methods of PEFT that this package attaches as it does LoRA: their learning is a slow test."""

Make = Callable[..., Any]


@pytest.fixture
def make(make_config: Make, make_controllable: Make) -> Make:
    """A config of two steps: `make(task, method, folder, *overrides)`."""

    def of(task: str, method: str, folder: Path, *overrides: str) -> Any:
        target = METHODS[method].model_fields["target"].default
        common = (
            f"adapter={{method: {method}, target: {'null' if target is None else target}}}",
            "training.steps=2",
            "training.batch_size=1",
            "training.checkpoint_every=1",
            *overrides,
        )
        if task == "dreambooth":
            return make_config(folder, "data.prior=null", *common)
        return make_controllable(folder, *common)

    return of


def sampled(folder: Path, task: str, merged: bool = False) -> np.ndarray:
    pipeline: Any = load_pipeline(folder, merged=merged)[0]
    if task == "dreambooth":
        images = sample_images(pipeline, jobs_for(["a qwe toy"], 1), Sampling(steps=2), seed=3)
    else:
        hint = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
        jobs = [Job("a house", condition="map", hint=hint)]
        images = sample_images(pipeline, jobs, ControllableSampling(steps=2), seed=3)
    return np.stack([np.asarray(image).astype(int) for _, image in images])


# Rates at which four steps show: those of training are for hundreds.
FAST_RATES = {"full": 1e-4, "controlnet": 1e-3, "magnitude": 1e-2, "vera": 3e-2}


def losses_on_one_batch(config: Any, task: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of a run that has its first batch in every step: the same photos, noise and timesteps."""
    prepare, first = TRAINED[task].prepare, []

    def prepare_once(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if not first:
            first.append(prepare(self, batch))
        return first[0]

    monkeypatch.setattr(TRAINED[task], "prepare", prepare_once)
    TASKS[task].run(config)
    return losses(config.output_dir)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in METHODS]
)
def test_every_method_learns_and_saves_no_weight_of_the_base(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The loss on one batch falls by a hundredth in three updates."""
    task = next(iter(METHODS[method].learning_rates))
    rate = f"training.learning_rate={FAST_RATES.get(method, 3e-3)}"
    found = losses_on_one_batch(make(task, method, tmp_path, "training.steps=4", rate), task, monkeypatch)
    assert found[-1] < 0.99 * found[0]
    if METHODS[method].peft_type:
        base = load_base("tiny").unet.state_dict()
        assert not base.keys() & {key.removeprefix("base_model.model.") for key in weights(tmp_path)}


def test_at_rate_zero_nothing_is_learnt(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = ("training.learning_rate=0", "training.steps=3", "training.require_certificate=false")
    config = make("dreambooth", "ether_plus", tmp_path, *still)
    first, *rest = losses_on_one_batch(config, "dreambooth", monkeypatch)
    assert rest == [first, first]


@pytest.mark.parametrize(
    ("task", "method"),
    [
        pytest.param(task, method, marks=() if (method, task) in QUICK else pytest.mark.slow)
        for task in TASKS
        for method, settings in METHODS.items()
        if task in settings.learning_rates
    ],
)
def test_a_run_resumes_exactly_and_its_merged_images_are_the_same(
    make: Make, tmp_path: Path, task: str, method: str
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    TASKS[task].run(make(task, method, once))
    shutil.copytree(once, twice)
    shutil.rmtree(twice / "checkpoints/step-000002")
    TASKS[task].run(make(task, method, twice, "training.resume=true"))
    files = sorted(path.relative_to(once) for path in once.rglob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert same(once / file, twice / file), file
    image = sampled(once, task)
    assert (image == sampled(twice, task)).all()
    if METHODS[method].peft_type:
        assert np.abs(sampled(once, task, merged=True) - image).max() <= 1


@pytest.mark.parametrize(
    ("task", "method"),
    [(task, method) for task in TASKS for method, settings in METHODS.items() if task not in settings.learning_rates],
)
def test_a_task_that_a_method_does_not_serve_is_refused_in_one_line(
    make: Make, tmp_path: Path, task: str, method: str
) -> None:
    served = ", ".join(METHODS[method].learning_rates)
    with pytest.raises(UserError, match=rf"^adapter\.method: '{method}' is not for {task}; it is for: {served}\.$"):
        TASKS[task].resolve(make(task, method, tmp_path / "run", "training.learning_rate=0.001"))

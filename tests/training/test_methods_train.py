"""Laws of a run that hold for every method of the table, in both tasks: exact resume, files, images, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.errors import UserError
from ether_diffusion.generation import ControllableSampling, Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.generation.conditioned import ConditionedJob, sample_conditioned
from ether_diffusion.training import controllable, dreambooth

TASKS = {"dreambooth": dreambooth, "controllable": controllable}
QUICK = {("oft", "dreambooth"), ("vera", "controllable")}  # the others take as long, each

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


def drawn(folder: Path, task: str, merged: bool = False) -> np.ndarray:
    pipeline: Any = load_pipeline(folder, merged=merged)[0]
    if task == "dreambooth":
        images = sample_images(pipeline, jobs_for(["a qwe toy"], 1), Sampling(steps=2), seed=3)
    else:
        hint = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
        jobs = [ConditionedJob("map", "a house", hint)]
        images = sample_conditioned(pipeline, jobs, ControllableSampling(steps=2), seed=3)
    return np.stack([np.asarray(image).astype(int) for _, image in images])


@pytest.mark.parametrize(
    ("task", "method"),
    [
        pytest.param(task, method, marks=() if (method, task) in QUICK else pytest.mark.slow)
        for task in TASKS
        for method, settings in METHODS.items()
        if task in settings.learning_rates
    ],
)
def test_a_run_resumes_exactly_and_draws_what_it_has_learnt(make: Make, tmp_path: Path, task: str, method: str) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    TASKS[task].run(make(task, method, once))
    shutil.copytree(once, twice)
    shutil.rmtree(twice / "checkpoints/step-000002")
    TASKS[task].run(make(task, method, twice, "training.resume=true"))
    files = sorted(path.relative_to(once) for path in once.rglob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        expected, found = load_file(once / file), load_file(twice / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), file
    image = drawn(once, task)
    assert (image == drawn(twice, task)).all()
    if METHODS[method].peft_type:
        assert np.abs(drawn(once, task, merged=True) - image).max() <= 1


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

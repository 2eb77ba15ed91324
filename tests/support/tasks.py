"""A DreamBooth task without a run: for tests that look at one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ether_diffusion.adapters.attach import attach
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth
from ether_diffusion.training.schedule import make_plan

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


def make_task(make_config: MakeConfig, folder: Path, *overrides: str, prediction: str = "epsilon") -> Any:
    """The photos stand in for class images, as in a dry run."""
    config = dreambooth.resolve(make_config(folder, *overrides))
    base, accelerator = load_base("tiny"), Accelerator()
    base.scheduler_config["prediction_type"] = prediction
    attach(base.unet, config.adapter, seed=1)
    task = dreambooth.DreamBoothTask(config, None, resumed=False)
    task.use_base(base, accelerator, dry_run=True)
    task.build(base, make_plan(config.training, task.samples_per_epoch), accelerator)
    return task

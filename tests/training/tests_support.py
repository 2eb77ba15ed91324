"""A DreamBooth task without a run: for tests that look at one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.adapters.attach import attach
from ether_diffusion.data.photo_dataset import DreamBoothDataset
from ether_diffusion.data.photos import find_photos
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


def make_task(make_config: MakeConfig, folder: Path, *overrides: str, prediction: str = "epsilon", **data: Any) -> Any:
    config = dreambooth.resolve(make_config(folder, *overrides))
    base = load_base("tiny")
    base.scheduler_config["prediction_type"] = prediction
    attach(base.unet, config.adapter, seed=1)
    photos = find_photos(config.data.instance_dir)
    dataset = DreamBoothDataset(
        photos,
        config.data.instance_prompt or "",
        resolution=64,
        class_folder=photos,
        class_prompt="a photo of toy",
        **data,
    )
    return dreambooth.DreamBoothTask(config, base, dataset, torch.device("cpu"), torch.float32)

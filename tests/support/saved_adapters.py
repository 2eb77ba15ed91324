"""Saved adapters of random vectors on the miniature, for tests that need many without training any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.adapters.attach import attach, sharing_copy, trainable_parameters
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.models.bases import load_base
from ether_diffusion.randomness import generator


def save_run(folder: Path, method: str = "ether_plus", seed: int = 0, **settings: Any) -> Path:
    """An adapter of random vectors in a run folder."""
    save_runs(folder.parent, [folder.name], method, seed, **settings)
    return folder


def save_runs(root: Path, names: Iterable[str], method: str = "ether_plus", seed: int = 0, **settings: Any) -> None:
    """Run folders of these names, each with an adapter of other vectors, of `seed` and the seeds after it."""
    base = load_base("tiny").unet
    for number, name in enumerate(names, seed):
        unet = sharing_copy(base)
        attach(unet, METHODS[method](**settings))
        noise = generator(number, method)
        for parameter in trainable_parameters(unet).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
        save_adapter(unet, root / name / "adapter", base_model="tiny")

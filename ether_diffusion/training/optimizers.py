"""The table of optimisers. Packages other than torch are imported where they are used."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any

import torch

from ether_diffusion.errors import UserError

from .config import TrainingSettings

OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch", "optim.AdamW", {}),
    "adamw_8bit": ("bitsandbytes", "optim.AdamW8bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
}
"""By name: the package, the class in it, and options besides those of the settings."""


def make_optimizer(settings: TrainingSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of the settings for parameter groups with their `lr`. Raises UserError: it is not installed."""
    package, name, options = OPTIMIZERS[settings.optimizer]
    try:
        optimizer = attrgetter(name)(importlib.import_module(package))
    except ImportError:
        missing = f"{settings.optimizer} needs a package that is not installed: pip install {package}"
        raise UserError(f"training.optimizer: {missing}") from None
    return optimizer(groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.epsilon, **options)

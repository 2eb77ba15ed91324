"""The table of optimisers. Those that are not torch's own are imported where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ether_diffusion.errors import UserError

from .settings import TrainingSettings

Groups = list[dict[str, Any]]


def make_optimizer(settings: TrainingSettings, groups: Groups) -> torch.optim.Optimizer:
    """The optimiser of the settings for parameter groups, each with its `lr`.

    Raises:
        UserError: its package is not installed.
    """
    return OPTIMIZERS[settings.optimizer](settings, groups)


def _adamw(settings: TrainingSettings, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.epsilon)


def _adamw_8bit(settings: TrainingSettings, groups: Groups) -> torch.optim.Optimizer:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise _missing("adamw_8bit", "bitsandbytes") from None
    options = {"betas": settings.betas, "weight_decay": settings.weight_decay, "eps": settings.epsilon}
    return bitsandbytes.optim.AdamW8bit(groups, **options)


def _prodigy(settings: TrainingSettings, groups: Groups) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise _missing("prodigy", "prodigyopt") from None
    options = {"betas": settings.betas, "weight_decay": settings.weight_decay, "eps": settings.epsilon}
    return Prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, **options)


OPTIMIZERS: dict[str, Callable[[TrainingSettings, Groups], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "prodigy": _prodigy,
}


def _missing(optimizer: str, package: str) -> UserError:
    return UserError(f"training.optimizer: {optimizer} needs a package that is not installed: pip install {package}")

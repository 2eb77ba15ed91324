"""The table of optimisers. Packages other than torch are imported where they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ether_diffusion.errors import UserError

from .config import TrainingSettings


def make_optimizer(settings: TrainingSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of the settings for parameter groups, each with its `lr`.

    Raises:
        UserError: its package is not installed.
    """
    name = settings.optimizer
    package, make = OPTIMIZERS[name]
    try:
        optimizer = make()
    except ImportError:
        missing = f"{name} needs a package that is not installed: pip install {package}"
        raise UserError(f"training.optimizer: {missing}") from None
    return optimizer(groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.epsilon)


def _adamw_8bit() -> Any:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    return bitsandbytes.optim.AdamW8bit


def _prodigy() -> Any:
    from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

    return partial(Prodigy, decouple=True, use_bias_correction=True, safeguard_warmup=True)


OPTIMIZERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "adamw": ("torch", lambda: torch.optim.AdamW),
    "adamw_8bit": ("bitsandbytes", _adamw_8bit),
    "prodigy": ("prodigyopt", _prodigy),
}
"""By name: the package, and a function that imports the optimiser's class."""

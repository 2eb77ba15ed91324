"""The one-block UNet with an adapter of any method in it that has been trained, for tests that run for every method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, trainable_parameters
from ether_diffusion.adapters.methods import METHODS
from support.unets import one_block_unet

ADAPTERS = [name for name, settings in METHODS.items() if settings.peft_type]
"""The methods whose adapters PEFT attaches."""


def settings_of(method: str, **settings: Any) -> Any:
    """The method's settings, as small as the UNet."""
    small = {"rank": 4} if method == "vera" else {}
    return METHODS[method](**{**small, **settings})


def moved_unet(method: str, dtype: torch.dtype = torch.float32, size: float = 0.1, **settings: Any) -> Any:
    """The UNet with an adapter whose parameters are all away from where they start."""
    unet = one_block_unet(dtype)
    attach(unet, settings_of(method, **settings))
    move(unet, size)
    return unet


def move(unet: nn.Module, size: float = 0.1) -> None:
    """Add the same noise of this standard deviation to every trainable parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(unet).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (2, 4, 8, 8), timesteps (2,) and text (2, 5, 24), the same each time."""
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((4, 8, 8), (5, 24)))
    return x, torch.tensor([10, 500]), text


def sample(unet: Any) -> Tensor:
    """The UNet's output for `inputs()`: (2, 4, 8, 8)."""
    with torch.no_grad():
        return unet(*inputs(unet.conv_in.weight.dtype)).sample


def saved_as(settings: Any) -> Any:
    """What stands for a saved adapter of these settings, where only its config and names are read."""
    return SimpleNamespace(config=settings.peft_config(), folder="runs/dog", method=settings.title)

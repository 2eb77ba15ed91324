"""A UNet of a few thousand weights, with an adapter in it that has learnt something, for tests of all methods."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, trainable_parameters
from ether_diffusion.adapters.methods import METHODS

# The entries whose adapters PEFT puts into a model.
ADAPTERS = [name for name, settings in METHODS.items() if settings.peft_type]


@functools.cache
def _base() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            cross_attention_dim=24,  # so that keys and values have other inputs than outputs
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()


def small_unet(dtype: torch.dtype = torch.float32) -> Any:
    unet: Any = copy.deepcopy(_base())
    return unet if dtype == torch.float32 else unet.to(dtype)


def sample(unet: Any) -> Tensor:
    """What the UNet makes of the same noise each time: (2, 4, 8, 8)."""
    dtype = unet.conv_in.weight.dtype
    with torch.no_grad():
        return unet(*inputs(dtype)).sample


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((4, 8, 8), (5, 24)))
    return x, torch.tensor([10, 500]), text


def settings_of(method: str, **settings: Any) -> Any:
    """The method's settings, as small as the UNet."""
    small = {"rank": 4} if method == "vera" else {}
    return METHODS[method](**{**small, **settings})


def moved_unet(method: str, dtype: torch.dtype = torch.float32, size: float = 0.1, **settings: Any) -> Any:
    """The UNet with an adapter whose parameters are all away from where they start."""
    unet = small_unet(dtype)
    attach(unet, settings_of(method, **settings))
    move(unet, size)
    return unet


def move(unet: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(unet).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))

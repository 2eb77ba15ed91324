"""UNets of a few thousand weights, whose tests take milliseconds. Each call returns a copy with the same weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import UNet2DConditionModel


def small_unet(widths: tuple[int, int] = (8, 16), text_width: int = 12, head_width: int = 4) -> UNet2DConditionModel:
    """Attention in the down, middle and up blocks; latents of 4 channels, 8 x 8."""
    return _copy_of(
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=head_width,
    )


def one_block_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """One attention block, whose keys and values have 24 input and 16 output features; latents of 4 channels, 8 x 8."""
    unet = _copy_of(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    return unet if dtype == torch.float32 else unet.to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]


def fast_compiling_unet() -> UNet2DConditionModel:
    """Attention in the middle block only, to compile or start in a process sooner; latents of 8 channels, 16 x 16."""
    return _copy_of(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=8,
    ).requires_grad_(False)


def _copy_of(**settings: Any) -> UNet2DConditionModel:
    return copy.deepcopy(_built(tuple({"sample_size": 8, "norm_num_groups": 4, **settings}.items())))


@functools.cache
def _built(settings: tuple[tuple[str, Any], ...]) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UNet2DConditionModel(layers_per_block=1, **dict(settings)).eval()

"""UNets of a few thousand weights, whose adapters' tests take milliseconds."""

from __future__ import annotations

import copy
import functools

import torch
from diffusers import UNet2DConditionModel


@functools.cache
def _built(widths: tuple[int, int], text_width: int, head_width: int) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
            attention_head_dim=head_width,
            norm_num_groups=4,
        ).eval()


def small_unet(widths: tuple[int, int] = (8, 16), text_width: int = 12, head_width: int = 4) -> UNet2DConditionModel:
    """One of its own, always with the same weights: attention on both sides and in the middle."""
    return copy.deepcopy(_built(widths, text_width, head_width))

"""A UNet of a few thousand weights for the tests of analyses, on one thread."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel


@functools.cache
def _unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Attention layers of 16 and 32 features, keys and values of 24 features."""
    return copy.deepcopy(_unet()).requires_grad_(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""A UNet of a few thousand weights for the tests of analyses, which all draw from the same seed."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from support.unets import small_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Attention layers of 16 and 32 features, keys and values of 24 features."""
    return small_unet((16, 32), text_width=24, head_width=8).requires_grad_(False)


@pytest.fixture(autouse=True)
def _seeded(seeded: None) -> None:
    pass

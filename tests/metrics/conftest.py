"""Images for scorers: smooth colours with noise, of any size, from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """`make_image(seed, size=(width, height))`: coarse colours, enlarged, with noise, so that filters differ."""

    def make(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(int) + random.integers(-40, 41, (size[1], size[0], 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    return make

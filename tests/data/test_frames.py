"""Frames and aspect buckets: where crops lie, and which shape a photo gets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.data.frames import Frame, buckets, nearest_bucket, scaled_size
from ether_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("photo", "target", "expected"),
    [
        ((1000, 500), (64, 64), (128, 64)),
        ((1000, 500), (96, 64), (128, 64)),
        ((10, 30), (64, 32), (64, 192)),
        ((150, 100), (64, 64), (96, 64)),
        ((100, 150), (64, 64), (64, 96)),
        ((20, 10), (64, 64), (128, 64)),
    ],
)
def test_scaled_to_cover_and_no_more(photo, target, expected):
    assert scaled_size(photo, target) == expected


def test_a_frame_is_a_crop_and_a_flip():
    levels = np.arange(6 * 4, dtype=np.uint8).reshape(4, 6)
    frame = Frame.at((6, 4), (3, 2), (1, 0.5))
    assert (frame.left, frame.top) == (3, 1)
    assert (np.asarray(frame.cut(Image.fromarray(levels))) == levels[1:3, 3:6]).all()
    flipped = Frame.at((6, 4), (3, 2), (1, 0.5), flipped=True)
    assert (np.asarray(flipped.cut(Image.fromarray(levels))) == levels[1:3, 3:6][:, ::-1]).all()


def test_buckets_are_multiples_within_the_area_and_cannot_grow():
    sizes = buckets(512, 64)
    assert (512, 512) in sizes
    assert (640, 384) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert width * height <= 512**2
        assert (width + 64) * height > 512**2 or width * (height + 64) > 512**2


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((3000, 3000), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((9000, 1), (4096, 64)),
    ],
)
def test_the_nearest_bucket(photo, expected):
    assert nearest_bucket(photo, buckets(512, 64)) == expected


@pytest.mark.parametrize("factor", [0, 65])
def test_factors_that_do_not_fit(factor):
    with pytest.raises(UserError, match=f"bucket_factor: {factor}, expected 1 to the resolution, 64"):
        buckets(64, factor)

"""Frames: the pixels of a photo that a sample shows, as numbers: scaled size, crop, flip. And aspect buckets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageOps

from ether_diffusion.errors import UserError

Size = tuple[int, int]
"""Width and height in pixels, in Pillow's order."""
Origin = tuple[int, int, int, int, int, int]
"""Where the pixels of a crop come from, as `Frame.of_original`."""


def scaled_size(photo: Size, target: Size) -> Size:
    """The smallest size of the scaled photo that covers `target`, proportions kept."""
    scale = max(want / side for want, side in zip(target, photo, strict=True))
    width, height = (max(want, round(side * scale)) for want, side in zip(target, photo, strict=True))
    return width, height


@dataclass(frozen=True)
class Frame:
    """A crop of `size` at (left, top) of a photo scaled to `scaled`, then mirrored if `flipped`."""

    scaled: Size
    left: int
    top: int
    size: Size
    flipped: bool = False

    @classmethod
    def at(cls, scaled: Size, size: Size, position: tuple[float, float] = (0.5, 0.5), flipped: bool = False) -> Frame:
        """`position` is (x, y) in [0, 1]: 0 at the left or top edge, 0.5 in the centre."""
        if scaled[0] < size[0] or scaled[1] < size[1]:
            raise ValueError(f"a crop of {size[0]} x {size[1]} does not fit into {scaled[0]} x {scaled[1]}")
        left, top = (round(share * (side - want)) for share, side, want in zip(position, scaled, size, strict=True))
        return cls(scaled, left, top, size, flipped)

    def of_original(self, photo: Size) -> Origin:
        """(height, width) of the photo, (top, left) of the crop in the scaled, mirrored photo, its (height, width)."""
        left = self.scaled[0] - self.left - self.size[0] if self.flipped else self.left
        return (photo[1], photo[0], self.top, left, self.size[1], self.size[0])

    def cut(self, image: Image.Image) -> Image.Image:
        """The frame's pixels of an image of the size `scaled`: of a photo, or of its mask."""
        assert image.size == self.scaled
        image = image.crop((self.left, self.top, self.left + self.size[0], self.top + self.size[1]))
        return ImageOps.mirror(image) if self.flipped else image


def buckets(resolution: int, factor: int = 64) -> list[Size]:
    """The widest size of each height and the highest of each width: multiples of `factor` within resolution² pixels.

    Raises:
        UserError: Not even one square of `factor` fits.
    """
    if not 1 <= factor <= resolution:
        raise UserError(f"bucket_factor: {factor}, expected 1 to the resolution, {resolution}")
    sides = range(factor, resolution**2 // factor + 1, factor)
    longest = {side: resolution**2 // side // factor * factor for side in sides}
    sizes = {(side, other) for side, other in longest.items() if other} | {(b, a) for a, b in longest.items() if b}
    return sorted(sizes)


def nearest_bucket(photo: Size, sizes: list[Size]) -> Size:
    """The size nearest in aspect ratio, on a logarithmic scale; of equally near ones the one with most pixels."""
    wanted = math.log(photo[0] / photo[1])
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - wanted), 9), -size[0] * size[1], size))

"""What judges see: an image resized by a stated filter, cropped, and made into pixels, as their authors do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise. All fields together are what a protocol has to state.

    Pillow resizes, on 8-bit pixels and with antialiasing: other libraries' filters of the same name give other pixels.

    Attributes:
        size: In pixels: of the short side, or of both where `squash`.
        filter: Of the resize.
        squash: To a square, whatever the proportions.
        crop: Side of the square that is cut from the centre, at most `size`; None for no crop.
        mean: Subtracted from each channel, of pixels in [0, 1].
        std: What each channel is divided by, after that.
    """

    size: int
    filter: Literal["bilinear", "bicubic"]
    squash: bool
    crop: int | None
    mean: Triple
    std: Triple

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32."""
        return normalised(self.resized(image), self.mean, self.std)

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W) float32. Images that come out at different sizes cannot be one batch: crop or squash."""
        return torch.stack([self(image) for image in images])

    def resized(self, image: Image.Image) -> Image.Image:
        """The 8-bit RGB image of which the pixels are taken."""
        image = image.convert("RGB")
        size = (self.size, self.size) if self.squash else _short_side(image.size, self.size)
        image = image if image.size == size else image.resize(size, _FILTERS[self.filter])
        return image if self.crop is None else _centre(image, self.crop)


DINO_SQUASH = Preprocessing(224, "bilinear", True, None, IMAGENET_MEAN, IMAGENET_STD)
"""As the processor of `facebook/dino-vits16`, which OFT's evaluator takes."""

DINO_CENTRE_CROP = Preprocessing(256, "bicubic", False, 224, IMAGENET_MEAN, IMAGENET_STD)
"""As DINO's own evaluation (Caron et al. 2021), which the DreamBooth paper's metric means."""

CLIP_CENTRE_CROP = Preprocessing(224, "bicubic", False, 224, CLIP_MEAN, CLIP_STD)
"""As OpenAI publish it with the weights."""

LPIPS_SQUASH = Preprocessing(512, "bilinear", True, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pixels in ±1, as OFT's evaluator makes them for LPIPS."""


def normalised(image: Image.Image, mean: Triple, std: Triple) -> Tensor:
    """(3, H, W) float32 of an RGB image: its pixels in [0, 1], less `mean`, over `std`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def levels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an image, at its own size."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _short_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    """torchvision's arithmetic: the long side is cut down to a whole number, not rounded."""
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _centre(image: Image.Image, side: int) -> Image.Image:
    """torchvision's arithmetic: half pixels are rounded to even."""
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))

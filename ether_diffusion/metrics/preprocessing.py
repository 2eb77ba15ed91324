"""Preprocessing of images for scorers: resized by a stated filter, cropped and normalised, as the authors do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ether_diffusion.limits import Side

Triple = tuple[float, float, float]
Mean = Annotated[float, Field(ge=-1, le=1)]
Deviation = Annotated[float, Field(gt=0, le=10)]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise. A protocol states all fields.

    Pillow resizes, on 8-bit pixels and with antialiasing: other libraries' filters of the same name give other pixels.

    Attributes:
        size: Of the short side in pixels; of both sides with `squash`.
        filter: Of the resize.
        squash: Resize to a square, without keeping the proportions.
        crop: Side in pixels of the square that is cut from the centre, at most `size`; None for no crop.
        mean: Subtracted from each channel, of pixels in [0, 1].
        std: Divides each channel after that.
    """

    size: Side
    filter: Literal["bilinear", "bicubic"]
    squash: bool
    crop: Side | None
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32."""
        return normalised(self.resized(image), self.mean, self.std)

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W) float32. The images must come out at one size: with crop or squash, or of one size before."""
        return torch.stack([self(image) for image in images])

    def resized(self, image: Image.Image) -> Image.Image:
        """The resized and cropped 8-bit RGB image, before it is normalised."""
        torchvision: Any = TF  # its annotations name tensors alone; it takes images, too, and resizes them by Pillow
        size = [self.size, self.size] if self.squash else [self.size]  # one number is the short side
        resized = torchvision.resize(image.convert("RGB"), size, InterpolationMode(self.filter))
        return resized if self.crop is None else torchvision.center_crop(resized, [self.crop, self.crop])


DINO_SQUASH = Preprocessing(224, "bilinear", True, None, IMAGENET_MEAN, IMAGENET_STD)
"""As the processor of `facebook/dino-vits16`, which OFT's evaluator uses."""

DINO_CENTRE_CROP = Preprocessing(256, "bicubic", False, 224, IMAGENET_MEAN, IMAGENET_STD)
"""As DINO's own evaluation (Caron et al. 2021), and so the DreamBooth paper's metric."""

CLIP_CENTRE_CROP = Preprocessing(224, "bicubic", False, 224, CLIP_MEAN, CLIP_STD)
"""As OpenAI publishes it with the weights."""

LPIPS_SQUASH = Preprocessing(512, "bilinear", True, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pixels in ±1, as OFT's evaluator uses them for LPIPS."""


def normalised(image: Image.Image, mean: Triple, std: Triple) -> Tensor:
    """(3, H, W) float32 of an RGB image: its pixels in [0, 1], minus `mean`, divided by `std`."""
    return TF.normalize(TF.to_tensor(image), list(mean), list(std))


def levels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an image, at its own size."""
    return TF.pil_to_tensor(image.convert("RGB")).contiguous()

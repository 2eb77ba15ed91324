"""Preprocessing: pixels equal to those of the scorers' authors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ether_diffusion.metrics.preprocessing import CLIP_CENTRE_CROP, DINO_CENTRE_CROP, DINO_SQUASH, LPIPS_SQUASH, levels

MakeImage = Callable[..., Image.Image]

SIZES = [(512, 512), (300, 451), (640, 427), (97, 230), (1003, 613), (224, 224), (257, 256)]
IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
REFERENCES: dict[str, tuple[Callable, Any]] = {
    "DINO's evaluation": (
        DINO_CENTRE_CROP,
        transforms.Compose(
            [
                transforms.Resize(256, interpolation=InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                IMAGENET,
            ]
        ),
    ),
    "open_clip": (CLIP_CENTRE_CROP, image_transform_v2(PreprocessCfg(), is_train=False)),
    "OFT's LPIPS": (
        LPIPS_SQUASH,
        transforms.Compose(
            [transforms.Resize((512, 512)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_references(make_image: MakeImage, name: str, size: tuple[int, int]) -> None:
    ours, theirs = REFERENCES[name]
    image = make_image(1, size)
    assert torch.equal(ours(image), theirs(image))


def test_pixels_are_those_of_dinos_processor(make_image: MakeImage) -> None:
    # The published preprocessor_config.json of facebook/dino-vits16.
    processor = ViTImageProcessorPil(
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=2,
        size={"height": 224, "width": 224},
    )
    images = [make_image(2, size) for size in ((300, 451), (97, 230))]
    theirs = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
    assert DINO_SQUASH.batch(images).numpy() == pytest.approx(theirs.numpy(), abs=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_converted_to_rgb(make_image: MakeImage, mode: str) -> None:
    image = make_image(4, (80, 60)).convert(mode)
    assert torch.equal(CLIP_CENTRE_CROP(image), CLIP_CENTRE_CROP(image.convert("RGB")))
    assert torch.equal(levels(image), transforms.PILToTensor()(image.convert("RGB")))


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(LPIPS_SQUASH.resized(image)), np.asarray(image))

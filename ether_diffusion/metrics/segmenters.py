"""Segmenters, which label every pixel: CSAIL's UPerNet-101, transformers' UperNet and SegFormer, the miniature's.

Each takes images of one size and gives (B, H, W) int64 labels 1 … C on the CPU, at that size; `num_classes` is C. As
for backbones, UserError is raised for weights that cannot be found, read or fitted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import digest_of_json
from ether_diffusion.tinyworld.scoring import load_scorers, segment, to_pixels
from ether_diffusion.weight_files import loading

from .backbones import Scorer
from .csail_upernet import Decoder, Encoder
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalised
from .weights import digest, fill, find_file, pretrained, read_tensors

Device = str | torch.device


CSAIL_SCALES = (300, 375, 450, 525, 600)
"""The short sides that CSAIL's evaluation averages over."""

CSAIL_SINGLE_SCALE = (450,)
"""The middle one alone: a fifth of the time, and other scores."""


@dataclass(frozen=True)
class CsailUperNet:
    """UPerNet-101 as CSAIL's evaluation runs it: probabilities at the image's own size, averaged over scales.

    Attributes:
        short_sides: Of the scales, in pixels; see `csail_size`.
    """

    encoder: nn.Module
    decoder: nn.Module
    device: torch.device
    short_sides: tuple[int, ...] = CSAIL_SCALES

    @property
    def num_classes(self) -> int:
        """150 in the published network."""
        return self.decoder.get_submodule("conv_last.1").weight.shape[0]  # pyright: ignore

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every weight of the encoder, and of the decoder, computed once."""
        return f"{digest(self.encoder)}-{digest(self.decoder)}"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Labels of every pixel."""
        return self.probabilities(images).argmax(dim=1).cpu() + 1

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, H, W) on the device."""
        width, height = _one_size(images)
        total: Any = 0
        for short in self.short_sides:
            size = csail_size((width, height), short)
            resized = [image.convert("RGB").resize(size, Image.Resampling.BILINEAR) for image in images]
            pixels = torch.stack([normalised(image, IMAGENET_MEAN, IMAGENET_STD) for image in resized])
            logits = self.decoder(self.encoder(pixels.to(self.device)))
            full = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
            total = total + full.softmax(dim=1) / len(self.short_sides)
        return total


def csail_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """The (width, height) that CSAIL's evaluation resizes an image of this size to.

    The long side is at most 1000; sides are cut to whole numbers, then raised to multiples of 32.
    """
    scale = min(short_side / min(size), 1000 / max(size))
    width, height = ((int(side * scale) - 1) // 32 * 32 + 32 for side in size)
    return width, height


CSAIL_FILES = {"encoder": "encoder_epoch_50.pth", "decoder": "decoder_epoch_50.pth"}


def load_csail_upernet(
    encoder: str | Path, decoder: str | Path, device: Device = "cpu", short_sides: tuple[int, ...] = CSAIL_SCALES
) -> CsailUperNet:
    """CSAIL's UPerNet-101.

    Args:
        encoder, decoder: Their published files, or a folder or a repository of the hub that has them under their
            published names.
    """
    ways = (
        f"CSAIL's project semantic-segmentation-pytorch publishes {CSAIL_FILES['encoder']} and "
        f"{CSAIL_FILES['decoder']} of ade20k-resnet101-upernet; download both, and give their folder or their paths."
    )

    def load(name: str, network: type[nn.Module], path: str | Path) -> nn.Module:
        with loading(f"UPerNet-101's {name}: cannot load {str(path)!r}", ways):
            tensors = read_tensors(find_file(str(path), (CSAIL_FILES[name],)))
            with torch.device("meta"):
                empty = network()
            return fill(empty, tensors)

    parts = load("encoder", Encoder, encoder), load("decoder", Decoder, decoder)
    return CsailUperNet(parts[0].to(device), parts[1].to(device), torch.device(device), tuple(short_sides))


@dataclass(frozen=True)
class TransformersSegmenter(Scorer):
    """A semantic segmenter of transformers, whose logits are enlarged to the image's size before the class is taken."""

    processor: Any

    @property
    def num_classes(self) -> int:
        """The number of the network's labels."""
        network: Any = self.network
        return int(network.config.num_labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every weight, and of the preprocessing, which no protocol states; computed once."""
        return f"{digest(self.network)}-{_processor_digest(self.processor)}"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Label k of the network, counted from 0, is class k + 1."""
        width, height = _one_size(images)
        inputs = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        logits = self.network(inputs["pixel_values"].to(self.device)).logits
        full = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return full.argmax(dim=1).cpu() + 1


def _processor_digest(processor: Any) -> str:
    """SHA-256 of a transformers processor's settings, without class names and defaults: those differ by version."""
    names = {"image_processor_type", "feature_extractor_type", "processor_class"}
    settings = {
        key: value
        for key, value in processor.to_dict().items()
        if value is not None and key not in names and not key.startswith("_")
    }
    return digest_of_json(settings, sort_keys=True, default=dict)


def load_transformers_segmenter(
    source: str = "nvidia/segformer-b0-finetuned-ade-512-512", device: Device = "cpu"
) -> TransformersSegmenter:
    """SegFormer or UperNet, trained on ADE20K, with their own preprocessing.

    Args:
        source: A hub name or a folder.
    """
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    ways = (
        "Ways to name a segmenter: a hub name, such as 'nvidia/segformer-b0-finetuned-ade-512-512' or "
        "'openmmlab/upernet-convnext-small' (needs the network once, or `hf download NAME` beforehand); or its folder."
    )
    with loading(f"segmenter: cannot load {source!r}", ways):
        # Code of a repository's own is never run, nor asked for. The published numbers used Pillow.
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
        network = pretrained(AutoModelForSemanticSegmentation, source, trust_remote_code=False)
    return TransformersSegmenter(source, network.to(device), torch.device(device), processor)


@dataclass(frozen=True)
class TinySegmenter(Scorer):
    """The miniature's segmenter, for its 64 x 64 images."""

    @property
    def num_classes(self) -> int:
        """The number of the network's labels without the one for unlabelled."""
        network: Any = self.network
        return int(network.config.num_labels) - 1

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Labels. Raises UserError for images of another size than 64 x 64."""
        size, pixels = _one_size(images), to_pixels(images)
        if size != (pixels.shape[-1], pixels.shape[-2]):
            side = pixels.shape[-1]
            raise UserError(f"the miniature's segmenter: an image of {size[0]} x {size[1]}; expected {side} x {side}.")
        network: Any = self.network
        return segment(network, pixels.to(self.device)).cpu()


def load_tiny_segmenter(device: Device = "cpu") -> TinySegmenter:
    """The miniature's segmenter, from the package."""
    network: Any = copy.deepcopy(load_scorers().segmenter)  # `load_scorers` is cached: the shared one must not move
    return TinySegmenter("tiny", network.to(device), torch.device(device))


def _one_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        found = ", ".join(f"{width} x {height}" for width, height in sizes) or "none"
        raise UserError(f"segmentation: images of one size are one batch; got {found}.")
    return sizes[0]

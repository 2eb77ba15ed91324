"""Scorers that compute features of images and texts, once loaded: frozen, in fp32, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.tinyworld.scoring import Scorers

from .preprocessing import CLIP_CENTRE_CROP, DINO_CENTRE_CROP, LPIPS_SQUASH, Preprocessing, levels
from .weights import digest


class ImageBackbone(Protocol):
    """Computes one vector for each image."""

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, D) fp32 on the CPU. The images are one batch."""
        ...


class TextBackbone(ImageBackbone, Protocol):
    """Maps images and texts into one space."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D) fp32 on the CPU."""
        ...


@dataclass(frozen=True)
class Scorer:
    """A loaded scoring network: a backbone or a segmenter.

    Attributes:
        source: The name, folder or file that it was loaded from, as given.
        network: Frozen, in fp32, on `device`.
    """

    source: str
    network: nn.Module
    device: torch.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every weight, computed once."""
        return digest(self.network)


@dataclass(frozen=True)
class DinoBackbone(Scorer):
    """A ViT trained by DINO (Caron et al. 2021); the features are the class token after the last norm."""

    preprocessing: Preprocessing = DINO_CENTRE_CROP

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 384) for ViT-S/16."""
        pixels = self.preprocessing.batch(images).to(self.device)
        network: Any = self.network
        if hasattr(network, "forward_features"):
            return network.forward_features(pixels)[:, 0].cpu()
        return network(pixels).last_hidden_state[:, 0].cpu()


@dataclass(frozen=True)
class ClipBackbone(Scorer):
    """CLIP (Radford et al. 2021) by open_clip; the features are projected, not normalised."""

    architecture: str
    preprocessing: Preprocessing = CLIP_CENTRE_CROP

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, D)."""
        network: Any = self.network
        return network.encode_image(self.preprocessing.batch(images).to(self.device)).cpu()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D). Texts of more than 75 tokens are cut."""
        network: Any = self.network
        return network.encode_text(self._tokenizer(list(texts)).to(self.device)).cpu()

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self.architecture)


@dataclass(frozen=True)
class LpipsBackbone(Scorer):
    """The network of LPIPS (Zhang et al. 2018), version 0.1: a trunk, and a weight for each of its channels."""

    net: str
    preprocessing: Preprocessing = LPIPS_SQUASH

    @torch.no_grad()
    def feature_maps(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """For each layer (B, C, H, W) on the device, normalised along C."""
        network: Any = self.network
        pixels = self.preprocessing.batch(images).to(self.device)
        maps = network.net(network.scaling_layer(pixels))
        return [one / (one.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for one in maps]

    @torch.no_grad()
    def distances(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """(L, R) fp64 on the CPU: LPIPS between all images of two `feature_maps`."""
        network: Any = self.network
        weights = [layer.model[-1].weight for layer in network.lins]
        total = torch.zeros(len(left[0]), len(right[0]), dtype=torch.float64)
        for one, other, weight in zip(left, right, weights, strict=True):
            for column in range(len(other)):
                weighted = F.conv2d((one - other[column]).square(), weight)
                total[:, column] += weighted.mean(dim=(1, 2, 3)).double().cpu()
        return total


@dataclass(frozen=True)
class InceptionBackbone(Scorer):
    """The Inception of FID, converted from TensorFlow by torch-fidelity; it resizes as TensorFlow 1 did, itself."""

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 2048), of 8-bit pixels at the images' own size."""
        if len({image.size for image in images}) > 1:
            return torch.cat([self.image_features([image]) for image in images])
        return self.network(torch.stack([levels(image) for image in images]).to(self.device))[0].cpu()


@dataclass(frozen=True)
class TinyBackbone(Scorer):
    """The miniature's backbone in the role of DINO, for its 64 x 64 images. On the CPU."""

    scorers: Scorers

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128)."""
        return self.scorers.identity(images)


@dataclass(frozen=True)
class TinyClip(Scorer):
    """The miniature's CLIP, for its 64 x 64 images. On the CPU."""

    scorers: Scorers

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128)."""
        return self.scorers.image_features(images)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, 128)."""
        return self.scorers.text_features(texts)

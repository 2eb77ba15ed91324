"""The judges that make features of images and texts, once they are loaded: frozen, in fp32, on any device."""

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
    """What makes one vector of an image."""

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, D) fp32 on the CPU. The images are one batch."""
        ...


class TextBackbone(ImageBackbone, Protocol):
    """What puts images and texts into one space."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D) fp32 on the CPU."""
        ...


@dataclass(frozen=True)
class _Judge:
    """A network and where it is from.

    Attributes:
        source: As it was named.
        network: Frozen, in fp32, on `device`.
    """

    source: str
    network: nn.Module
    device: torch.device

    @cached_property
    def digest(self) -> str:
        """Of every weight; taken once."""
        return digest(self.network)


@dataclass(frozen=True)
class DinoBackbone(_Judge):
    """A ViT trained by DINO (Caron et al. 2021); features are the class token after the last norm."""

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
class ClipBackbone(_Judge):
    """CLIP (Radford et al. 2021) by open_clip; features are projected and not normalised."""

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
class LpipsBackbone(_Judge):
    """The network of LPIPS (Zhang et al. 2018), version 0.1: a trunk, and a weight for each of its channels."""

    net: str
    preprocessing: Preprocessing = LPIPS_SQUASH

    @torch.no_grad()
    def feature_maps(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """For each layer (B, C, H, W) on the device, of length 1 along C."""
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
class InceptionBackbone(_Judge):
    """The Inception of FID, converted from TensorFlow by torch-fidelity; it resizes as TensorFlow 1 did, itself."""

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 2048), of 8-bit pixels at the images' own size."""
        if len({image.size for image in images}) > 1:
            return torch.cat([self.image_features([image]) for image in images])
        return self.network(torch.stack([levels(image) for image in images]).to(self.device))[0].cpu()


@dataclass(frozen=True)
class TinyBackbone(_Judge):
    """The miniature's judge in the role of DINO, for 64 x 64 pictures of its world. On the CPU."""

    judges: Scorers

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128)."""
        return self.judges.identity(images)


@dataclass(frozen=True)
class TinyClip(_Judge):
    """The miniature's judge in the role of CLIP. On the CPU."""

    judges: Scorers

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128)."""
        return self.judges.image_features(images)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, 128)."""
        return self.judges.text_features(texts)

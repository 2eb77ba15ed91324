"""The miniature's scorers: networks that classify and segment images of the world and compare two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, SegformerForSemanticSegmentation, ViTModel

from . import WEIGHTS
from .phrasing import WHERE
from .scenes import CLASSES, SETTINGS, SIZE


@dataclass(frozen=True)
class Scorers:
    """The three scorers, frozen, in fp32.

    Attributes:
        clip: Embeds images and captions in one space: the role of CLIP-I and CLIP-T. Its text tower is the text encoder
            of the miniature's pipeline.
        backbone: Recognises an individual in any place: the role of DINO.
        segmenter: Labels every pixel: the role of UperNet.
    """

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    backbone: ViTModel
    segmenter: SegformerForSemanticSegmentation

    @torch.no_grad()
    def identity(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128) class tokens of the backbone, of length 1: their scalar products are cosine similarities."""
        return _in_parts(images, lambda pixels: F.normalize(self.backbone(pixels).last_hidden_state[:, 0], dim=1))

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 128) CLIP features of images, of length 1."""
        clip = self.clip
        return _in_parts(
            images, lambda x: F.normalize(clip.visual_projection(clip.vision_model(x).pooler_output), dim=1)
        )

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, 128) CLIP features of captions, of length 1."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.clip.text_model(tokens["input_ids"]).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=1)

    def choose(self, images: Sequence[Image.Image], candidates: Sequence[Sequence[str]]) -> list[int]:
        """Zero-shot classification: for each image the index of the candidate nearest in CLIP.

        A candidate is a group of captions, whose features are averaged (prompt ensembling, Radford et al. 2021).
        """
        texts = torch.stack([F.normalize(self.text_features(group).mean(dim=0), dim=0) for group in candidates])
        return (self.image_features(images) @ texts.T).argmax(dim=1).tolist()

    def settings(self, images: Sequence[Image.Image]) -> list[str]:
        """For each image the one of `SETTINGS` nearest in CLIP."""
        places = [[f"a {kind} {where}" for kind in CLASSES for where in WHERE[setting]] for setting in SETTINGS]
        return [SETTINGS[k] for k in self.choose(images, places)]

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B, 64, 64) uint8, indices of `render.LABELS` from 1 on."""
        return _in_parts(images, lambda pixels: segment(self.segmenter, pixels)).byte().numpy()


@lru_cache(maxsize=2)
def load_scorers(folder: Path = WEIGHTS) -> Scorers:
    """The shipped scorers, or those in another weights folder of `pretrain`."""
    scorers = Scorers(
        CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder / "clip"),
        ViTModel.from_pretrained(folder / "backbone", dtype=torch.float32, add_pooling_layer=False),
        SegformerForSemanticSegmentation.from_pretrained(folder / "segmenter", dtype=torch.float32),
    )
    for network in (scorers.clip, scorers.backbone, scorers.segmenter):
        network.eval().requires_grad_(False)
    return scorers


def full_size(segmenter: SegformerForSemanticSegmentation, pixels: Tensor) -> Tensor:
    """Logits (B, labels, H, W), enlarged to the image's size."""
    return F.interpolate(segmenter(pixels).logits, pixels.shape[-2:], mode="bilinear", align_corners=False)


def segment(segmenter: SegformerForSemanticSegmentation, pixels: Tensor) -> Tensor:
    """(B, H, W) labels from 1 on; no pixel stays unlabelled."""
    return full_size(segmenter, pixels)[:, 1:].argmax(dim=1) + 1


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, 64, 64) in ±1; images of other sizes are resized."""
    fitted = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in fitted])).permute(0, 3, 1, 2) / 127.5 - 1


def _in_parts(images: Sequence[Image.Image], function) -> Tensor:
    return torch.cat([function(part) for part in to_pixels(images).split(64)])

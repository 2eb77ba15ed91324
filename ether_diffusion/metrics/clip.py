"""CLIP-T: how well an image matches its prompt, by CLIP (Ruiz et al. 2022, DreamBooth, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .accumulators import PairMetric, batches
from .backbones import TextBackbone
from .pairwise import TEXT


class ClipTextScore(PairMetric):
    """Mean cosine of an image and its own text, in [-1, 1]; higher is a better match.

    Ours, not torchmetrics' CLIPScore: that resizes by other filters, computes in fp32 and clips at zero.
    """

    name = "CLIP-T"

    def __init__(self, backbone: TextBackbone, batch_size: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.batch_size = batch_size

    def update(self, images: Sequence[Image.Image], texts: Sequence[str], keys: Sequence[str], *, subject: str) -> Self:
        """Add images of a subject, with one text and one key each.

        Raises:
            UserError: a key counted twice, or not one text and one key an image.
        """
        self._check(len(images), texts, keys, subject)
        for part in batches(len(images), self.batch_size):
            features = self.backbone.image_features(images[part])
            self.update_features(features, texts[part], keys[part], subject=subject)
        return self

    def update_features(
        self, image_features: Tensor, texts: Sequence[str], keys: Sequence[str], *, subject: str
    ) -> Self:
        """As `update`, for (N, D) features of images that the backbone has computed already."""
        self._check(len(image_features), texts, keys, subject)
        different = list(dict.fromkeys(texts))
        if not different:
            return self
        rows = self.backbone.text_features(different)[[different.index(text) for text in texts]]
        values = F.cosine_similarity(image_features.double().cpu(), rows.double(), dim=1)
        for key, value in zip(keys, values, strict=True):
            self.table.add((subject, key, TEXT), value)
        return self

    def _check(self, images: int, texts: Sequence[str], keys: Sequence[str], subject: str) -> None:
        if not images == len(texts) == len(keys):
            raise UserError(f"{self.name}: {images} images, {len(texts)} texts and {len(keys)} keys of {subject}.")

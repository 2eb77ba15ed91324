"""CLIP-I and CLIP-T: likeness to the subject's photos, and faithfulness to the prompt, by CLIP.

Ruiz et al. 2022, DreamBooth, section 4.2: mean cosines of CLIP's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from ether_diffusion.errors import UserError

from .accumulators import PairTable, State
from .backbones import TextBackbone
from .pairwise import TEXT, Pairs, summary
from .similarity import ImageSimilarity


class ClipImageScore(ImageSimilarity):
    """CLIP-I: of a `ClipBackbone`'s image features, in [-1, 1]; higher is more alike."""

    name = "CLIP-I"


class ClipTextScore:
    """CLIP-T: mean cosine of an image and its own text, in [-1, 1]; higher is more faithful.

    Args:
        backbone: Makes the features.
        batch_size: Images at a time.
    """

    name = "CLIP-T"

    def __init__(self, backbone: TextBackbone, batch_size: int = 32) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.table = PairTable(self.name)

    def update(self, images: Sequence[Image.Image], texts: Sequence[str], keys: Sequence[str], *, subject: str) -> Self:
        """Add images of a subject, with one text and one key each.

        Raises:
            UserError: a key counted twice, or not one text and one key an image.
        """
        self._check(len(images), texts, keys, subject)
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            features = self.backbone.image_features(images[part])
            self.update_features(features, texts[part], keys[part], subject=subject)
        return self

    def update_features(
        self, image_features: Tensor, texts: Sequence[str], keys: Sequence[str], *, subject: str
    ) -> Self:
        """As `update`, for (N, D) features of images that the backbone has made already."""
        self._check(len(image_features), texts, keys, subject)
        different = list(dict.fromkeys(texts))
        if not different:
            return self
        rows = self.backbone.text_features(different)[[different.index(text) for text in texts]]
        values = F.cosine_similarity(image_features.double().cpu(), rows.double(), dim=1)
        for key, value in zip(keys, values.tolist(), strict=True):
            self.table.add(subject, key, TEXT, value)
        return self

    def pairs(self) -> dict[str, Pairs]:
        """For each subject its images as rows, and one column."""
        return self.table.pairs()

    def compute(self) -> dict[str, Any]:
        """`macro`, `flat`, `per_group` (by subject) and `pairs`, as `pairwise.summary` gives them.

        Raises:
            UserError: no images.
        """
        return summary(self.pairs(), self.name)

    def state(self) -> State:
        """For `merge`, on another process."""
        return self.table.state()

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for an image that both have."""
        self.table.merge(state)
        return self

    def _check(self, images: int, texts: Sequence[str], keys: Sequence[str], subject: str) -> None:
        if not images == len(texts) == len(keys):
            raise UserError(f"{self.name}: {images} images, {len(texts)} texts and {len(keys)} keys of {subject}.")

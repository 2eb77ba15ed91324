"""Subject similarity of generated to real images: mean cosines of DINO's features (DINO) or of CLIP's (CLIP-I).

Ruiz et al. 2022, DreamBooth, section 4.2: all pairs of a generated and a real image of the same subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .accumulators import FeatureMetric, PairwiseMetric
from .pairwise import Pairs, cosines, cosines_among


class ImageSimilarity(FeatureMetric, PairwiseMetric):
    """Mean cosine over pairs of a generated and a real image of the same subject, in [-1, 1]; higher is more alike."""

    name = "similarity"

    def update(self, images: Sequence[Image.Image], keys: Sequence[str], *, subject: str, real: bool) -> Self:
        """Add images of a subject, one key each. Raises UserError: a key counted twice, or not one key an image."""
        return self._add(subject, images, keys, real)

    def update_features(self, features: Tensor, keys: Sequence[str], *, subject: str, real: bool) -> Self:
        """As `update`, for (N, D) features that the backbone has computed already."""
        return self._add_features(subject, features, keys, real)

    def pairs(self) -> dict[str, Pairs]:
        """For each subject all pairs: rows are generated images, columns real ones.

        Raises:
            UserError: a subject has images of one kind alone.
        """
        real, generated = set(self.real.groups()), set(self.generated.groups())
        for lonely, kind in ((sorted(real - generated), "generated"), (sorted(generated - real), "real")):
            if lonely:
                raise UserError(f"{self.name}: no {kind} images of {', '.join(lonely)}.")
        return {subject: cosines(self.generated.of(subject), self.real.of(subject)) for subject in self.real.groups()}

    def real_pairs(self) -> dict[str, Pairs]:
        """For each subject all pairs of two different real images: the best value to expect of generated ones."""
        return {subject: cosines_among(self.real.of(subject)) for subject in self.real.groups()}


class DinoScore(ImageSimilarity):
    """By a `DinoBackbone`: ViT-S/16 class tokens, which tell individuals of one class apart."""

    name = "DINO"


class ClipImageScore(ImageSimilarity):
    """By the image features of a `ClipBackbone`."""

    name = "CLIP-I"

"""Likeness of generated to real images: cosines of features, subject by subject. DINO and CLIP-I are this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from typing_extensions import Self

from ether_diffusion.errors import UserError

from .accumulators import FeatureTable, State
from .backbones import ImageBackbone
from .pairwise import Pairs, cosines, cosines_among, summary


class ImageSimilarity:
    """Mean cosine over pairs of a generated and a real image of the same subject.

    Images are named by keys, so that each counts once, on whatever process it was seen.

    Args:
        backbone: Makes the features.
        batch_size: Images at a time.
    """

    name: ClassVar[str] = "similarity"

    def __init__(self, backbone: ImageBackbone, batch_size: int = 32) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.real = FeatureTable(f"{self.name}, real images")
        self.generated = FeatureTable(f"{self.name}, generated images")

    def update(self, images: Sequence[Image.Image], keys: Sequence[str], *, subject: str, real: bool) -> Self:
        """Add images of a subject, one key each.

        Raises:
            UserError: a key counted twice, or not one key an image.
        """
        if len(keys) != len(images):
            raise UserError(f"{self.name}: {len(keys)} keys for {len(images)} images of {subject}.")
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            features = self.backbone.image_features(images[part])
            self.update_features(features, keys[part], subject=subject, real=real)
        return self

    def update_features(self, features: Tensor, keys: Sequence[str], *, subject: str, real: bool) -> Self:
        """As `update`, for (N, D) features that the backbone has made already."""
        (self.real if real else self.generated).add(subject, keys, features)
        return self

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
        """For each subject all pairs of two different real images: what is the best to expect."""
        return {subject: cosines_among(self.real.of(subject)) for subject in self.real.groups()}

    def compute(self) -> dict[str, Any]:
        """`macro`, `flat`, `per_group` (by subject) and `pairs`, as `pairwise.summary` gives them.

        Raises:
            UserError: nothing to compare, or a subject has images of one kind alone.
        """
        return summary(self.pairs(), self.name)

    def state(self) -> State:
        """For `merge`, on another process."""
        return {"real": self.real.state(), "generated": self.generated.state()}

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for an image that both have."""
        self.real.merge(state["real"])
        self.generated.merge(state["generated"])
        return self

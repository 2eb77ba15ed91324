"""LPIPS: perceptual distance (Zhang et al. 2018), between generated and real images, and among the generated ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from ether_diffusion.errors import UserError

from .accumulators import PairTable, State
from .backbones import LpipsBackbone
from .pairwise import Pairs, summary


class _Distances:
    """Distances of pairs, group by group."""

    name: ClassVar[str]

    def __init__(self, backbone: LpipsBackbone, batch_size: int = 4) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.table = PairTable(self.name)

    def pairs(self) -> dict[str, Pairs]:
        """For each group its pairs."""
        return self.table.pairs()

    def compute(self) -> dict[str, Any]:
        """`macro`, `flat`, `per_group` and `pairs`, as `pairwise.summary` gives them.

        Raises:
            UserError: nothing to compare.
        """
        return summary(self.pairs(), self.name)

    def state(self) -> State:
        """For `merge`, on another process."""
        return self.table.state()

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for a pair that both have."""
        self.table.merge(state)
        return self

    def _maps(self, images: Sequence[Image.Image], keys: Sequence[str]) -> Iterator[tuple[list[Tensor], Sequence[str]]]:
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.backbone.feature_maps(images[part]), keys[part]

    def _check(self, images: Sequence[Image.Image], keys: Sequence[str], group: str) -> None:
        if len(images) != len(keys):
            raise UserError(f"{self.name}: {len(keys)} keys for {len(images)} images of {group}.")
        if len(set(keys)) < len(keys):
            raise UserError(f"{self.name}: {max(keys, key=list(keys).count)} of {group} is counted twice.")

    def _held(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[Tensor]:
        batches = [maps for maps, _ in self._maps(images, keys)]
        return [torch.cat(layers) for layers in zip(*batches, strict=True)]


class LpipsScore(_Distances):
    """Mean distance over pairs of a generated and a real image of the same subject: the DreamBooth tables' LPIPS.

    Args:
        backbone: Makes the feature maps. The real images' are held while a subject is added: at 512 x 512 10 MB an
            image for alex, 128 MB for vgg.
        batch_size: Generated images at a time.
    """

    name = "LPIPS"

    def update(
        self,
        generated: Sequence[Image.Image],
        generated_keys: Sequence[str],
        real: Sequence[Image.Image],
        real_keys: Sequence[str],
        *,
        subject: str,
    ) -> Self:
        """Add all pairs of these images.

        Raises:
            UserError: no real images, not one key an image, or a pair counted twice.
        """
        if not real:
            raise UserError(f"{self.name}: no real images of {subject}.")
        self._check(generated, generated_keys, subject)
        self._check(real, real_keys, subject)
        held = self._held(real, real_keys)
        for maps, keys in self._maps(generated, generated_keys):
            for key, row in zip(keys, self.backbone.distances(maps, held).tolist(), strict=True):
                for column, value in zip(real_keys, row, strict=True):
                    self.table.add(subject, key, column, value)
        return self


class LpipsDiversity(_Distances):
    """Mean distance among images of one group, such as those of one prompt, each pair once; higher is more diverse.

    Args:
        backbone: Makes the feature maps, which are held for the images of one group.
        batch_size: Images at a time.
    """

    name = "LPIPS diversity"

    def update(self, images: Sequence[Image.Image], keys: Sequence[str], *, group: str) -> Self:
        """Add all images of a group, at once.

        Raises:
            UserError: fewer than two images, not one key an image, or a pair counted twice.
        """
        if len(images) < 2:
            raise UserError(f"{self.name}: {len(images)} images of {group}; pairs need two.")
        self._check(images, keys, group)
        named = dict(sorted(zip(keys, images, strict=True), key=lambda pair: pair[0]))
        held, keys = self._held(list(named.values()), list(named)), list(named)
        for k in range(len(images) - 1):
            one, others = [layer[k : k + 1] for layer in held], [layer[k + 1 :] for layer in held]
            for column, value in zip(keys[k + 1 :], self.backbone.distances(one, others)[0].tolist(), strict=True):
                self.table.add(group, keys[k], column, value)
        return self

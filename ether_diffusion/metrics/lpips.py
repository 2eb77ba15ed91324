"""LPIPS: perceptual distance (Zhang et al. 2018), between generated and real images, and among the generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .accumulators import PairMetric, batches, check_keys
from .backbones import LpipsBackbone


class _Distances(PairMetric):
    """Distances of pairs of images."""

    def __init__(self, backbone: LpipsBackbone, batch_size: int = 4) -> None:
        super().__init__()
        self.backbone = backbone
        self.batch_size = batch_size

    def _maps(self, images: Sequence[Image.Image]) -> list[Tensor]:
        found = [self.backbone.feature_maps(images[part]) for part in batches(len(images), self.batch_size)]
        return [torch.cat(layers) for layers in zip(*found, strict=True)]

    def _check(self, images: Sequence[Image.Image], keys: Sequence[str], group: str) -> None:
        check_keys(self.name, group, len(images), keys)
        if len(set(keys)) < len(keys):
            raise UserError(f"{self.name}: {max(keys, key=list(keys).count)} of {group} is counted twice.")


class LpipsScore(_Distances):
    """Mean distance over pairs of a generated and a real image of the same subject: the DreamBooth tables' LPIPS.

    Args:
        backbone: Computes the feature maps. Those of the real images stay in memory while a subject is added: at
            512 x 512 10 MB an image for alex, 128 MB for vgg.
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
        columns = self._maps(real)
        for part in batches(len(generated), self.batch_size):
            rows = self.backbone.distances(self.backbone.feature_maps(generated[part]), columns)
            for key, row in zip(generated_keys[part], rows, strict=True):
                self._add_pairs(subject, key, real_keys, row)
        return self


class LpipsDiversity(_Distances):
    """Mean distance among images of one group, such as those of one prompt, each pair once; higher is more diverse.

    Args:
        backbone: Computes the feature maps. Those of one group stay in memory while it is added.
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
        by_key = dict(sorted(zip(keys, images, strict=True), key=lambda pair: pair[0]))
        names = list(by_key)
        maps = self._maps(list(by_key.values()))
        for k in range(len(names) - 1):
            one, others = [layer[k : k + 1] for layer in maps], [layer[k + 1 :] for layer in maps]
            self._add_pairs(group, names[k], names[k + 1 :], self.backbone.distances(one, others)[0])
        return self

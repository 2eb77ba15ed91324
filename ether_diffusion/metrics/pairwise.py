"""Values of pairs (a generated image and a real one, or an image and its text), group by group, and their means.

A group is what a protocol weighs: a subject, or a subject and a prompt. Means are taken in fp64 and in the order of
the names, so that they depend neither on the order of arrival nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.errors import UserError

TEXT = "text"
"""The only column of pairs of images and their texts."""


@dataclass(frozen=True)
class Pairs:
    """The values of one group.

    Attributes:
        rows: Names of the images, sorted; of the generated ones, where there are two kinds.
        columns: Names of what they are compared with, sorted.
        values: (rows, columns) fp64.
        counted: (rows, columns) bool; False for an image with itself, and for the second of (a, b) and (b, a).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor
    counted: Tensor

    def mean(self) -> float:
        """The mean over all pairs."""
        return float(self.values[self.counted].mean())


def cosines(left: tuple[Sequence[str], Tensor], right: tuple[Sequence[str], Tensor]) -> Pairs:
    """Cosine similarity of all (L, D) rows of `left` with all (R, D) rows of `right`; each comes with its names."""
    values = F.normalize(left[1].double()) @ F.normalize(right[1].double()).T
    return Pairs(tuple(left[0]), tuple(right[0]), values, torch.ones_like(values, dtype=torch.bool))


def cosines_among(images: tuple[Sequence[str], Tensor]) -> Pairs:
    """Cosine similarity of (N, D) rows among themselves, each pair of two different ones once."""
    pairs = cosines(images, images)
    return Pairs(pairs.rows, pairs.columns, pairs.values, pairs.counted.triu(diagonal=1))


def summary(groups: Mapping[str, Pairs], what: str) -> dict[str, Any]:
    """Means of pairs.

    Args:
        what: The metric's name, for errors.

    Returns:
        `macro`: each group weighs the same. `flat`: each pair weighs the same, so groups with more pairs weigh more.
        `per_group`: the mean of each group. `pairs`: the number of its pairs.

    Raises:
        UserError: no groups, or a group without a pair.
    """
    counts = {name: int(groups[name].counted.sum()) for name in sorted(groups)}
    empty = [name for name, count in counts.items() if not count]
    if not counts or empty:
        raise UserError(f"{what}: no pairs to compare" + (f" in {', '.join(empty)}." if empty else "."))
    means = {name: groups[name].mean() for name in counts}
    flat = sum(means[name] * count for name, count in counts.items()) / sum(counts.values())
    return {"macro": sum(means.values()) / len(means), "flat": flat, "per_group": means, "pairs": counts}

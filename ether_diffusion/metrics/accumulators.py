"""What metrics keep: tensors under names, each counted once, merged from any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .backbones import ImageBackbone
from .pairwise import Pairs, summary

State = dict[str, Any]
"""Lists of strings, numbers and tensors: fit for `all_gather_object`, for safetensors with JSON, or for Ray."""


class Table:
    """Tensors of one shape under names (group, key, …). Equal to the bit for every order of arrival.

    Args:
        what: The metric's name, for errors.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._values: dict[tuple[str, ...], Tensor] = {}

    def add(self, name: tuple[str, ...], value: Tensor) -> None:
        """Store a copy on the CPU. Raises UserError for a name already stored, or a value that is not finite."""
        group, *keys = name
        if name in self._values:
            raise UserError(f"{self.what}: {' with '.join(keys)} of {group} is counted twice.")
        if not value.isfinite().all():
            raise UserError(f"{self.what}: the value of {' with '.join(keys)} of {group} is not finite.")
        self._values[name] = value.detach().cpu().clone()

    def groups(self) -> list[str]:
        """The names of the groups, sorted."""
        return sorted({name[0] for name in self._values})

    def of(self, group: str) -> tuple[tuple[str, ...], Tensor]:
        """The sorted keys of a group whose names are (group, key), and its (N, D) rows in that order."""
        keys = tuple(sorted(name[1] for name in self._values if name[0] == group))
        return keys, torch.stack([self._values[group, key] for key in keys]) if keys else torch.empty(0, 0)

    def pairs(self) -> dict[str, Pairs]:
        """The numbers under (group, row, column) by group; pairs that were not stored are not counted."""
        return {group: self._pairs_of(group) for group in self.groups()}

    def _pairs_of(self, group: str) -> Pairs:
        names = sorted(name[1:] for name in self._values if name[0] == group)
        rows, columns = (sorted(set(part)) for part in zip(*names, strict=True))
        values = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        counted = torch.zeros_like(values, dtype=torch.bool)
        for row, column in names:
            at = rows.index(row), columns.index(column)
            values[at], counted[at] = self._values[group, row, column], True
        return Pairs(tuple(rows), tuple(columns), values, counted)

    def state(self) -> State:
        """Everything that is stored."""
        names = sorted(self._values)
        values = torch.stack([self._values[name] for name in names]) if names else torch.empty(0, 0)
        return {"names": [list(name) for name in names], "values": values}

    def merge(self, state: State) -> None:
        """Add what another process has stored. Raises UserError for a name that both have."""
        for name, value in zip(state["names"], state["values"], strict=True):
            self.add(tuple(name), value)


class Metric:
    """A metric that keeps tables. Keys name the images, so that each counts once.

    Attributes:
        tables: By the key in `state`.
    """

    name: ClassVar[str]
    tables: dict[str, Table]

    def state(self) -> State:
        """For `merge`, on another process."""
        return {key: table.state() for key, table in self.tables.items()}

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for what both have."""
        for key, table in self.tables.items():
            table.merge(state[key])
        return self


class FeatureMetric(Metric):
    """A metric of the features of real and of generated images, which a backbone computes in batches."""

    def __init__(self, backbone: ImageBackbone, batch_size: int = 32) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.real, self.generated = (Table(f"{self.name}, {kind} images") for kind in ("real", "generated"))
        self.tables = {"real": self.real, "generated": self.generated}

    def _add(self, group: str, images: Sequence[Image.Image], keys: Sequence[str], real: bool) -> Self:
        check_keys(self.name, group, len(images), keys)
        for part in batches(len(images), self.batch_size):
            self._add_features(group, self.backbone.image_features(images[part]), keys[part], real)
        return self

    def _add_features(self, group: str, features: Tensor, keys: Sequence[str], real: bool) -> Self:
        check_keys(self.name, group, len(features), keys)
        for key, row in zip(keys, features.float(), strict=True):
            (self.real if real else self.generated).add((group, key), row)
        return self


class PairwiseMetric(Metric):
    """A metric whose values belong to pairs of images, or of an image and its text."""

    def pairs(self) -> dict[str, Pairs]:
        """The pairs of each group."""
        raise NotImplementedError

    def compute(self) -> dict[str, Any]:
        """`macro`, `flat`, `per_group` and `pairs`, as `pairwise.summary` gives them.

        Raises:
            UserError: nothing to compare.
        """
        return summary(self.pairs(), self.name)


class PairMetric(PairwiseMetric):
    """A metric that keeps numbers: of a generated image with a real one, with its text, or with another."""

    def __init__(self) -> None:
        self.table = Table(self.name)
        self.tables = {"pairs": self.table}

    def pairs(self) -> dict[str, Pairs]:
        """The pairs of each group."""
        return self.table.pairs()

    def _add_pairs(self, group: str, row: str, columns: Sequence[str], values: Tensor) -> None:
        for column, value in zip(columns, values.double(), strict=True):
            self.table.add((group, row, column), value)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `count` places."""
    return (slice(start, start + size) for start in range(0, count, size))


def check_keys(what: str, group: str, images: int, keys: Sequence[str]) -> None:
    """Raise UserError for anything but one key an image."""
    if len(keys) != images:
        raise UserError(f"{what}: {len(keys)} keys for {images} images of {group}.")

"""What metrics keep: features and pair values under names, each counted once, merged from any number of processes."""

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


class FeatureTable:
    """Vectors under (group, key). Equal to the bit for every order of arrival.

    Args:
        what: The metric's name, for errors.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._rows: dict[tuple[str, str], Tensor] = {}

    def add(self, group: str, keys: Sequence[str], rows: Tensor) -> None:
        """Store (N, D) rows.

        Raises:
            UserError: not one key a row, a key already stored in the group, or values that are not finite.
        """
        check_keys(self.what, group, len(rows), keys)
        rows = rows.detach().to("cpu", torch.float32)
        for key, row in zip(keys, rows, strict=True):
            if (group, key) in self._rows:
                raise UserError(f"{self.what}: {key} of {group} is counted twice.")
            if not row.isfinite().all():
                raise UserError(f"{self.what}: the features of {key} of {group} are not finite.")
            self._rows[group, key] = row.clone()

    def groups(self) -> list[str]:
        """The names of the groups, sorted."""
        return sorted({group for group, _ in self._rows})

    def of(self, group: str) -> tuple[tuple[str, ...], Tensor]:
        """The sorted keys of a group, and its (N, D) rows in that order."""
        keys = tuple(sorted(key for name, key in self._rows if name == group))
        return keys, torch.stack([self._rows[group, key] for key in keys]) if keys else torch.empty(0, 0)

    def state(self) -> State:
        """Everything that is stored."""
        names = sorted(self._rows)
        rows = torch.stack([self._rows[name] for name in names]) if names else torch.empty(0, 0)
        return {"groups": [group for group, _ in names], "keys": [key for _, key in names], "rows": rows}

    def merge(self, state: State) -> None:
        """Add what another process has stored. Raises UserError for a key that both have."""
        for group, key, row in zip(state["groups"], state["keys"], state["rows"], strict=True):
            self.add(group, [key], row[None])


class PairTable:
    """Numbers under (group, row, column). Equal to the bit for every order of arrival.

    Args:
        what: The metric's name, for errors.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._values: dict[tuple[str, str, str], float] = {}

    def add(self, group: str, row: str, column: str, value: float) -> None:
        """Store one value. Raises UserError for a pair already stored, or a value that is not finite."""
        if (group, row, column) in self._values:
            raise UserError(f"{self.what}: {row} with {column} of {group} is counted twice.")
        if not abs(value) < float("inf"):
            raise UserError(f"{self.what}: the value of {row} with {column} of {group} is not finite.")
        self._values[group, row, column] = value

    def pairs(self) -> dict[str, Pairs]:
        """The pairs of each group; those that were not stored are not counted."""
        found: dict[str, list[tuple[str, str, float]]] = {}
        for group, row, column in sorted(self._values):
            found.setdefault(group, []).append((row, column, self._values[group, row, column]))
        return {group: _rectangle(values) for group, values in found.items()}

    def state(self) -> State:
        """Everything that is stored."""
        names = sorted(self._values)
        columns = [list(column) for column in zip(*names, strict=True)] or [[], [], []]
        values = torch.tensor([self._values[name] for name in names], dtype=torch.float64)
        return {"groups": columns[0], "rows": columns[1], "columns": columns[2], "values": values}

    def merge(self, state: State) -> None:
        """Add what another process has stored. Raises UserError for a pair that both have."""
        values = state["values"].tolist()
        for group, row, column, value in zip(state["groups"], state["rows"], state["columns"], values, strict=True):
            self.add(group, row, column, value)


class FeatureMetric:
    """A metric of the features of real and of generated images. Keys name the images, so that each counts once.

    Args:
        backbone: Computes the features.
        batch_size: Images at a time.
    """

    name: ClassVar[str]

    def __init__(self, backbone: ImageBackbone, batch_size: int = 32) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.real = FeatureTable(f"{self.name}, real images")
        self.generated = FeatureTable(f"{self.name}, generated images")

    def state(self) -> State:
        """For `merge`, on another process."""
        return {"real": self.real.state(), "generated": self.generated.state()}

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for an image that both have."""
        self.real.merge(state["real"])
        self.generated.merge(state["generated"])
        return self

    def _add(self, group: str, images: Sequence[Image.Image], keys: Sequence[str], real: bool) -> Self:
        check_keys(self.name, group, len(images), keys)
        for part in batches(len(images), self.batch_size):
            self._add_features(group, self.backbone.image_features(images[part]), keys[part], real)
        return self

    def _add_features(self, group: str, features: Tensor, keys: Sequence[str], real: bool) -> Self:
        (self.real if real else self.generated).add(group, keys, features)
        return self


class PairMetric:
    """A metric whose values belong to pairs: of a generated image with a real one, with its text, or with another."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.table = PairTable(self.name)

    def pairs(self) -> dict[str, Pairs]:
        """The pairs of each group."""
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


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `count` places."""
    return (slice(start, start + size) for start in range(0, count, size))


def check_keys(what: str, group: str, images: int, keys: Sequence[str]) -> None:
    """Refuse anything but one key an image. Raises UserError."""
    if len(keys) != images:
        raise UserError(f"{what}: {len(keys)} keys for {images} images of {group}.")


def _rectangle(found: list[tuple[str, str, float]]) -> Pairs:
    rows, columns = tuple(sorted({row for row, _, _ in found})), tuple(sorted({column for _, column, _ in found}))
    places = [{name: place for place, name in enumerate(names)} for names in (rows, columns)]
    values = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    counted = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for row, column, value in found:
        at = places[0][row], places[1][column]
        values[at], counted[at] = value, True
    return Pairs(rows, columns, values, counted)

"""Adapters that are trained at once on one base: the samples of a batch take the vectors of several, with gradients.

Each adapter is an ordinary one, in a model of its own that shares the base's tensors. A further model, which carries
none, runs the batch: its layers read the vectors of all adapters, stacked, group of samples by group.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import transform as T
from .bank import SIDES, put_layers
from .config import EtherConfig
from .layer import EachSample


class Stacked:
    """Gives a model's layers the vectors of adapters that other models carry.

    Args:
        model: Without adapters; changed in place. Outside `take` it is the base.
        config: Of the adapters.
        carriers: Models of the same layers, each with an adapter of this config.
        name: The adapters' name in them.

    Raises:
        ValueError: a layer cannot be adapted, or the model carries adapters.
    """

    def __init__(
        self, model: nn.Module, config: EtherConfig, carriers: Sequence[nn.Module], name: str = "default"
    ) -> None:
        layers, layout = put_layers(model, config)
        self._alike: dict[tuple[int, int, int], list[str]] = {}
        """The transforms' names by their shapes: those of one shape are computed together."""
        for transform, shape in layout.shapes.items():
            self._alike.setdefault(shape, []).append(transform)
        self._vectors = [_vectors(carrier, layout.shapes, name) for carrier in carriers]
        self._rows: dict[str, Tensor] | None = None
        for layer_name, layer in layers.items():
            sides = [f"{layer_name}.{side}" for side in SIDES if f"{layer_name}.{side}" in layout.shapes]
            layer.each = functools.partial(self._each, sides)

    @contextlib.contextmanager
    def take(self, adapters: Sequence[int]) -> Iterator[None]:
        """Within the block the samples of a batch take these adapters, by their indices: as many groups of consecutive
        samples, all of one size. The backward pass belongs into the block too: checkpointed layers run again in it.
        """
        self._rows = {}
        for (k, n, b), transforms in self._alike.items():
            u, v = (
                torch.stack([self._vectors[one][name][key] for name in transforms for one in adapters])
                if key in "uv"[:k]
                else None
                for key in "uv"
            )
            assert u is not None
            rows = T.rows_each(u, v).view(len(transforms), len(adapters), k, n, b)
            self._rows |= dict(zip(transforms, rows.unbind(), strict=True))
        try:
            yield
        finally:
            self._rows = None

    def _each(self, sides: Sequence[str], x: Tensor) -> EachSample | None:
        if self._rows is None:
            return None
        rows = [self._rows[side] for side in sides]
        return EachSample(rows[:1], rows[1:])


def _vectors(carrier: nn.Module, transforms: Iterable[str], name: str) -> dict[str, dict[str, Tensor]]:
    """The trained vectors of an adapter: by transform, and "u" or "v"."""
    return {each: dict(carrier.get_submodule(f"{each}.{name}").named_parameters()) for each in transforms}

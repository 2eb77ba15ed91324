"""Adapters that are trained at once on one base: the samples of a batch take the vectors of several, with gradients.

Each adapter is an ordinary one, in a model of its own that shares the base's tensors. A further model, which carries
none, runs the batch: its layers read the vectors of all adapters, group of samples by group. All vectors, and their
gradients, are views of one tensor with a row for each adapter, so that what is done to a whole adapter is one kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import transform as T
from .bank import SIDES, put_layers
from .config import EtherConfig
from .layer import EachSample


class Stacked:
    """Gives a model's layers the vectors of adapters that other models carry.

    Attributes:
        weights: (adapters, numbers), all that is trained; the adapters' vectors are views of it.
        gradients: As `weights`, and always there: clear them with zeros.

    Args:
        model: Without adapters; changed in place. Outside `take` it is the base.
        config: Of the adapters.
        carriers: Models of the same layers, each with an adapter of this config. Its vectors become views.
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
        vectors = [self._vectors(carrier, name) for carrier in carriers]
        self._sizes = [len(names) * n * b for (k, n, b), names in self._alike.items() for _ in range(k)]
        """Numbers of an adapter, by shape: those of all u, then those of all v."""
        first = vectors[0][0]
        self.weights = torch.empty(len(carriers), sum(self._sizes), dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.weights)
        for own, row, gradient in zip(vectors, self.weights, self.gradients, strict=True):
            _make_views(own, row, gradient)
        self._rows: dict[str, Tensor] | None = None
        for layer_name, layer in layers.items():
            sides = [f"{layer_name}.{side}" for side in SIDES if f"{layer_name}.{side}" in layout.shapes]
            layer.each = functools.partial(self._each, sides)

    @contextlib.contextmanager
    def take(self, adapters: Sequence[int]) -> Iterator[None]:
        """Within the block the samples of a batch take these adapters, by their indices: as many groups of consecutive
        samples, all of one size. The backward pass belongs into the block, at whose end `gradients` has its gradients.
        """
        chosen = list(adapters)
        is_all = chosen == list(range(len(self.weights)))
        taken = (self.weights.detach() if is_all else self.weights[chosen]).requires_grad_()
        parts = iter(taken.split(self._sizes, 1))
        self._rows = {}
        for (k, n, b), transforms in self._alike.items():
            shape = len(chosen), len(transforms), n, b
            u, v = (next(parts).view(shape).transpose(0, 1).flatten(0, 1) if key in "uv"[:k] else None for key in "uv")
            assert u is not None
            rows = T.rows_each(u, v).view(len(transforms), len(chosen), k, n, b)
            self._rows |= dict(zip(transforms, rows.unbind(), strict=True))
        try:
            yield
            if taken.grad is not None and is_all:
                self.gradients += taken.grad
            elif taken.grad is not None:
                self.gradients[chosen] += taken.grad
        finally:
            self._rows = None

    def _each(self, sides: Sequence[str], x: Tensor) -> EachSample | None:
        if self._rows is None:
            return None
        rows = [self._rows[side] for side in sides]
        return EachSample(rows[:1], rows[1:])

    def _vectors(self, carrier: nn.Module, name: str) -> list[nn.Parameter]:
        """The trained vectors of an adapter in the order of `weights`."""
        sides = {each: carrier.get_submodule(f"{each}.{name}") for names in self._alike.values() for each in names}
        return [
            sides[each].get_parameter(key)
            for (k, _, _), names in self._alike.items()
            for key in "uv"[:k]
            for each in names
        ]


def _make_views(vectors: Sequence[nn.Parameter], row: Tensor, gradient: Tensor) -> None:
    """Let vectors and their gradients be views of a row each."""
    sizes = [vector.numel() for vector in vectors]
    for vector, part, slope in zip(vectors, row.split(sizes), gradient.split(sizes), strict=True):
        part.copy_(vector.detach().flatten())
        vector.data, vector.grad = part.view_as(vector), slope.view_as(vector)

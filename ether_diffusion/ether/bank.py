"""A bank: many adapters of one shape on one model, from which every sample of a batch takes its own.

Reflections make that cheap. An adapter is a few vectors a layer, so that of all adapters there is one table with a row
of numbers for each; choosing those of a batch is one lookup of rows, after which each layer does what it does for one
adapter, as a batched product (`transform.transform_each`). What a compiled model reads keeps its place and shape, so
that adapters come and go without compiling anything again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from . import transform as T
from .config import EtherConfig
from .layer import EachSample, EtherLayer

SIDES = EtherLayer.adapter_layer_names
"""What a transform's vectors are called in the names of an adapter's tensors, after the layer's own name."""


@dataclass(frozen=True)
class Layout:
    """Where the coefficients of each transform of an adapter stand in one row of numbers."""

    shapes: Mapping[str, tuple[int, int, int]]
    """(k, n, b) by the transform's name, such as "mid_block.attentions.0.to_q.ether_in"; in the order of names."""

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Layout:
        """The layout of adapters with vectors of these shapes: (n, b) by name, "….ether_in.u", "….ether_in.v".

        Raises:
            ValueError: a name is of no vector of an ETHER adapter.
        """
        found: dict[str, tuple[int, int, int]] = {}
        for key in sorted(shapes):
            name, _, vector = key.rpartition(".")
            if vector not in ("u", "v") or name.rpartition(".")[2] not in SIDES or len(shapes[key]) != 2:
                raise ValueError(f"{key} is no vector of ETHER or ETHER+.")
            n, b = shapes[key]
            found[name] = (2 if f"{name}.v" in shapes else 1, n, b)
        return cls(found)

    @cached_property
    def size(self) -> int:
        """Numbers in a row: as many as the vectors have."""
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def starts(self) -> dict[str, int]:
        """The index of each transform's first number."""
        starts, start = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = start
            start += math.prod(shape)
        return starts

    def row(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The row (size,) of an adapter, in at least single precision, from its vectors by name."""
        dtype = T.at_least_single(*(vector.dtype for vector in vectors.values()))
        row = torch.empty(self.size, dtype=dtype)
        for name, (k, n, b) in self.shapes.items():
            u, v = (vectors[f"{name}.{key}"].to("cpu", dtype).unsqueeze(0) if key in "uv"[:k] else None for key in "uv")
            assert u is not None
            self.part(row, name).view(k, n, b).copy_(T.rows_each(u, v)[0])
        return row

    def vectors(self, row: Tensor) -> dict[str, Tensor]:
        """Unit vectors by name whose adapter has this row."""
        found = {}
        for name, shape in self.shapes.items():
            u, v = T.vectors_each(self.part(row, name).view(1, *shape))
            found |= {f"{name}.{key}": vector[0] for key, vector in (("u", u), ("v", v)) if vector is not None}
        return found

    def part(self, rows: Tensor, name: str) -> Tensor:
        """The numbers of one transform in rows (..., size)."""
        return rows[..., self.starts[name] : self.starts[name] + math.prod(self.shapes[name])]

    def difference(self, other: Layout) -> str | None:
        """The first way in which another layout differs, as `what: its own; the other's`; None: they are the same."""
        if self.shapes == other.shapes:
            return None
        layers, others = ({name.rpartition(".")[0] for name in one.shapes} for one in (self, other))
        if layers != others:
            return f"layers: {len(layers)}; {len(others)} (only one of them has {min(layers ^ others)})"
        common = [name for name in self.shapes if name in other.shapes]
        for name in common:
            if self.shapes[name][0] != other.shapes[name][0]:
                return f"variant: {_VARIANTS[self.shapes[name][0]]}; {_VARIANTS[other.shapes[name][0]]}"
        only = self.shapes.keys() ^ other.shapes.keys()
        if only:
            name = min(only)
            own, its = ("both" if name in one.shapes else "in" for one in (self, other))
            return f"sides of {name.rpartition('.')[0]}: {own}; {its}"
        name = next(name for name in common if self.shapes[name] != other.shapes[name])
        own, its = (f"{n} of width {b}" for _, n, b in (self.shapes[name], other.shapes[name]))
        return f"blocks of {name}: {own}; {its}"


_VARIANTS = {1: "ETHER", 2: "ETHER+"}


class Bank:
    """Puts ETHER layers into a model that take the adapters of a batch's samples from a table of `capacity` rows.

    Outside `select` the model is the base. The layers carry no adapters of their own.

    Args:
        model: Without adapters. Changed in place.
        config: Of the adapters. Which layers it adapts, and how, is the same for all.
        dtype: Of the table; default: single precision, or double for a base in double precision. bf16 takes half the
            memory and rounds each coefficient to 8 bits; the products are computed in single precision in any case.
        device: Of the table; default: that of the first adapted layer.

    Raises:
        ValueError: a layer cannot be adapted, or the model carries adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EtherConfig,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layers, self.layout = put_layers(model, config)
        self.capacity = capacity
        weights = [next(layer.get_base_layer().parameters()) for layer in layers.values()]
        places = [weight.device for weight in weights if weight.device.type != "meta"]
        self.dtype = dtype or T.at_least_single(*(weight.dtype for weight in weights))
        self.table = torch.zeros(
            capacity + 1, self.layout.size, dtype=self.dtype, device=device or (places[0] if places else "cpu")
        )
        self.rows: dict[str, int] = {}
        self._free = list(reversed(range(capacity)))
        self.chosen = Chosen(T.at_least_single(self.dtype))
        for name, layer in layers.items():
            layer.each = EachOfLayer(self.chosen, self.layout, name)

    def put(self, name: str, row: Tensor) -> None:
        """Write an adapter's row, as `layout.row` makes it, into the table; one of this name is replaced.

        Raises:
            ValueError: all rows are taken.
        """
        if name not in self.rows:
            if not self._free:
                raise ValueError(f"the bank holds {self.capacity} adapters already; remove one first.")
            self.rows[name] = self._free.pop()
        with torch.no_grad():
            self.table[self.rows[name]].copy_(row)

    def remove(self, name: str) -> None:
        """Free an adapter's row. Raises KeyError: there is none of this name."""
        self._free.append(self.rows.pop(name))

    @contextlib.contextmanager
    def select(self, names: Sequence[str | None], scales: Sequence[float] | None = None) -> Iterator[None]:
        """Within the block the samples of a batch take these adapters, in this order; None: the base, exactly.

        A batch of twice as many samples, the two halves of classifier-free guidance, takes the names twice.

        Args:
            scales: The adapters' strengths; default: 1. With adapters on both sides of a layer, any other one takes a
                second pass of that layer's base.

        Raises:
            KeyError: no adapter of one of these names is in the bank.
            ValueError: there are no names, or other numbers of names and scales; or a block is in another one.
        """
        if self.chosen.rows is not None:
            raise ValueError("adapters are selected already; a block of `select` cannot be in another one.")
        if not names or isinstance(names, str):
            raise ValueError(f"expected one name a sample, got {names!r:.80}.")
        if scales is not None and len(scales) != len(names):
            raise ValueError(f"{len(scales)} scales for {len(names)} names; expected as many.")
        index = [self.capacity if name is None else self.rows[name] for name in names]
        self.chosen.fill(self.table, index, scales)
        try:
            yield
        finally:
            self.chosen.clear()


class Chosen:
    """The coefficients that the samples of a batch take, in the place where all layers of a model read them."""

    rows: Tensor | None = None
    """(2 B, size), the names twice; None outside of a selection."""
    scales: Tensor | None = None
    """(2 B,)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: tuple[Tensor, Tensor] | None = None

    def fill(self, table: Tensor, index: Sequence[int], scales: Sequence[float] | None) -> None:
        count, size = 2 * len(index), table.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            if self._kept is None or len(self._kept[0]) != count:
                rows = torch.empty(count, size, dtype=self.dtype, device=table.device)
                self._kept = rows, torch.empty(count, dtype=self.dtype, device=table.device)
            rows, weights = self._kept
            places = torch.tensor([*index, *index], device=table.device)
            if rows.dtype == table.dtype:
                torch.index_select(table, 0, places, out=rows)
            else:
                rows.copy_(table[places])
            if scales is not None:
                weights.copy_(torch.tensor([*scales, *scales], dtype=weights.dtype))
        self.rows, self.scales = rows, None if scales is None else weights

    def clear(self) -> None:
        self.rows = self.scales = None


class EachOfLayer:
    """What a layer takes of the chosen coefficients: its own, for as many samples as there are in its input."""

    def __init__(self, chosen: Chosen, layout: Layout, layer: str) -> None:
        self.chosen = chosen
        names = [f"{layer}.{side}" for side in SIDES]
        self.sides = [(layout.starts[name], layout.shapes[name]) for name in names if name in layout.shapes]

    def __call__(self, x: Tensor) -> EachSample | None:
        rows, scales = self.chosen.rows, self.chosen.scales
        if rows is None:
            return None
        count = len(x)
        if count not in (len(rows), len(rows) // 2):
            raise ValueError(
                f"a batch of {count} samples, and {len(rows) // 2} names; expected one name a sample, or a batch of "
                "twice as many samples for guidance."
            )
        taken = [rows[:count, start : start + math.prod(shape)].view(count, *shape) for start, shape in self.sides]
        return EachSample(taken[:1], taken[1:], None if scales is None else scales[:count])


_NAME = "bank"


def put_layers(model: nn.Module, config: EtherConfig) -> tuple[dict[str, EtherLayer], Layout]:
    """Put ETHER layers without adapters into a model, which is then the base as long as no layer's `each` is set.

    Returns:
        The layers by name, and the layout of the adapters that they would carry.

    Raises:
        ValueError: a layer cannot be adapted, or the model carries adapters.
    """
    if any(isinstance(module, EtherLayer) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} carries adapters; a bank needs a model without.")
    inject_adapter_in_model(config, model, _NAME, low_cpu_mem_usage=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, EtherLayer)}
    sides = {
        f"{name}.{key}": side[_NAME]
        for name, layer in layers.items()
        for key, side in zip(SIDES, layer._dicts(), strict=True)
        if _NAME in side
    }
    layout = Layout.of(
        {f"{name}.{key}": vector.shape for name, side in sides.items() for key, vector in side.named_parameters()}
    )
    for layer in layers.values():
        _take_out(layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return layers, layout


def _take_out(layer: EtherLayer) -> None:
    """Leave a layer without the adapter that put it into the model."""
    for side in layer._dicts():
        side.clear()
    layer.r.clear()
    layer.scaling.clear()
    layer._active_adapter = []

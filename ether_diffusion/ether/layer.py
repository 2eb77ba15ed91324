"""A frozen Linear or Conv2d whose input (and output) features are transformed by ETHER or ETHER+."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import transform as T
from .config import EtherConfig
from .weight_layer import WeightLayer


class Hyperplanes(nn.Module):
    """Trainable normals of one transform: u and, for ETHER+, v, each (num_blocks, features / num_blocks).

    A module and not bare parameters, so that hooks that load weights before `forward` (accelerate's offloading) fire.
    """

    def __init__(self, variant: str, features: int, num_blocks: int, init_weights: bool, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (num_blocks, features // num_blocks)
        self.u = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.v = nn.Parameter(torch.empty(shape, dtype=dtype)) if variant == "ether_plus" else None
        self.reset(init_weights)

    @torch.no_grad()
    def reset(self, init_weights: bool) -> None:
        """u uniform in ±1/sqrt(b); v = -u, so that H+ = I, or independent of u if not `init_weights`."""
        bound = 1 / math.sqrt(self.u.shape[1])
        self.u.uniform_(-bound, bound)
        if self.v is not None:
            self.v.copy_(-self.u) if init_weights else self.v.uniform_(-bound, bound)

    def forward(self) -> T.Reflection:
        """The transform, in at least single precision."""
        u = self.u.to(T.at_least_single(self.u.dtype))
        return T.ether(u) if self.v is None else T.ether_plus(u, self.v.to(u.dtype))


BASE = "__base__"
"""PEFT's name, in `adapter_names`, for a sample that no adapter changes."""


class EachSample(NamedTuple):
    """Transforms that differ from sample to sample, as `transform_each` takes them."""

    rows_in: Sequence[Tensor]
    """Coefficients (G, k, n, b) of the layer's input, applied one after the other: for samples that differ in k or n,
    each of these is the identity of the samples that it is not for."""
    rows_out: Sequence[Tensor] = ()
    scales: Tensor | None = None
    """(G,) strengths, as of an adapter; None: 1. With `rows_out` they take a second pass of the base layer."""


class EtherLayer(WeightLayer):
    """ETHER on a frozen `nn.Linear`, x (..., in_features), or an `nn.Conv2d` with one group, x (B, in_channels, H, W).

    W' = H_out W H_in. Several active adapters do not commute.
    """

    method: ClassVar[str] = "ETHER"
    narrowest_block: ClassVar[int] = 2
    """Blocks one wide would be degenerate: a unit vector of one entry is a sign."""
    adapter_layer_names = ("ether_in", "ether_out")
    ether_in: nn.ModuleDict
    ether_out: nn.ModuleDict
    each: Callable[[Tensor], EachSample | None] | None = None
    """Set by what gives every sample of a batch an adapter of its own, such as a `Bank`: called with the layer's input.
    None from it: the base layer. The layer then carries no adapters."""

    def update_layer(self, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        if self.each is not None:
            raise ValueError(f"{module_name} belongs to a bank of adapters. Load the adapter into the bank.")
        super().update_layer(adapter_name, config, module_name)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The output of the layer with the adapted weight. Same shapes and dtypes as the base layer.

        Args:
            adapter_names: The adapter of each sample, or "__base__", in place of the active ones.
        """
        if self.disable_adapters or (adapter_names is None and self.each is None):
            return super().forward(x, *args, **kwargs)
        each = self._named(x, adapter_names or []) if self.each is None else self.each(x)
        return self.base_layer(x, *args, **kwargs) if each is None else self._adapted_each(x, each, *args, **kwargs)

    @property
    def in_use(self) -> bool:
        return super().in_use or (self.each is not None and not self.disable_adapters)

    @classmethod
    def divided_sides(cls, config: EtherConfig, module_name: str) -> int:
        return 2 if config.sides_of(module_name) == "both" else 1

    def _make(self, config: EtherConfig, module_name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        features = self.divided_features(self.get_base_layer(), config, module_name)
        blocks = config.blocks_of(module_name)
        return {
            key: Hyperplanes(config.variant, width, blocks, config.init_weights, dtype)
            for key, width in zip(self.adapter_layer_names, features, strict=False)
        }

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if not names:
            return self.base_layer(x, *args, **kwargs)
        *before, name = names  # the last adapter is the outermost: first on the input, last on the output
        scale = self.scaling[name]
        h_in = self.ether_in[name]()
        if name not in self.ether_out:
            return self._adapted(T.transform(h_in, x, self.channel_dim, scale), before, *args, **kwargs)
        z = self._adapted(T.transform(h_in, x, self.channel_dim), before, *args, **kwargs)
        y = T.transform(self.ether_out[name](), z, self.channel_dim, fixed=self._bias(x))
        if scale == 1:
            return y
        return torch.lerp(self._adapted(x, before, *args, **kwargs), y, scale)

    def _adapted_each(self, x: Tensor, each: EachSample, *args: Any, **kwargs: Any) -> Tensor:
        """As `_adapted`, with an adapter a group of samples."""
        rows_in, rows_out, scales = each
        z = x
        for rows in rows_in:
            z = T.transform_each(rows, z, self.channel_dim, None if rows_out else scales)
        y = self.base_layer(z, *args, **kwargs)
        if not rows_out:
            return y
        for rows in rows_out:
            y = T.transform_each(rows, y, self.channel_dim, fixed=self._bias(x))
        if scales is None:
            return y
        weights = scales.to(y).repeat_interleave(len(y) // len(scales)).view(-1, *(1 for _ in y.shape[1:]))
        return torch.lerp(self.base_layer(x, *args, **kwargs), y, weights)

    def _named(self, x: Tensor, names: Sequence[str]) -> EachSample:
        """The transforms of samples whose adapters this layer carries under these names.

        Raises:
            ValueError: as PEFT's own layers with `adapter_names`.
        """
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        side_in, side_out = (_stacked(side, names) for side in self._dicts())
        scales = [self.scaling.get(name, 1.0) for name in names]
        return EachSample(side_in, side_out, None if set(scales) <= {1} else torch.tensor(scales, device=x.device))

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        return T.weight_change(weight, self.ether_in[name](), self._change_out(name))

    def low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors (B, A) of the change of the base weight by an adapter alone, at its scale, as `transform.low_rank`'s.

        Raises:
            ValueError: the base weight is quantised or offloaded.
        """
        weight = self._float_weight()
        with torch.no_grad():
            B, A = T.low_rank(weight, self.ether_in[name](), self._change_out(name))
        return self.scaling[name] * B, A

    def _change_out(self, name: str) -> T.Change | None:
        return self.ether_out[name]() if name in self.ether_out else None


def _stacked(side: nn.ModuleDict, names: Sequence[str]) -> list[Tensor]:
    """The coefficients of a side for each name, (G, k, n, b): one tensor for each shape that they have."""
    alike: dict[torch.Size, dict[str, Tensor]] = {}
    for name in dict.fromkeys(names):
        if name in side:
            u, v, *_ = side[name]()
            rows = T.rows_each(u.unsqueeze(0), None if v is None else v.unsqueeze(0))
            alike.setdefault(rows.shape, {})[name] = rows
    stacks = []
    for rows in alike.values():
        identity = torch.zeros_like(next(iter(rows.values())))
        stacks.append(torch.cat([rows.get(name, identity) for name in names]))
    return stacks

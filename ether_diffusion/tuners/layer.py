"""A frozen Linear or Conv2d under Naive adapters (its input times free blocks) or magnitudes (scales of its rows)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ether_diffusion.ether.frozen import layer_features, layer_problem
from ether_diffusion.ether.transform import at_least_single
from ether_diffusion.ether.weight_layer import WeightLayer

from .config import MagnitudeConfig, NaiveConfig
from .products import scale_rows, times_blocks


class Change(nn.Module):
    """What is trained: by how much the blocks R_i differ from the identity, or the scales from 1. It starts at zero.

    The difference is what is stored, so that an adapter changes no bit at its start, keeps its precision in a half
    dtype, and is drawn towards the base by weight decay, not towards a weight of zeros.

    A module and not a bare parameter, so that hooks that load weights before `forward` (accelerate's offloading) fire.
    """

    def __init__(self, shape: tuple[int, ...], deviation: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape, dtype=dtype))
        if deviation:
            nn.init.normal_(self.change, std=deviation)

    def forward(self) -> Tensor:
        return self.change.to(at_least_single(self.change.dtype))


class _TunerLayer(nn.Module, WeightLayer):
    """One class for `nn.Linear`, features in the last dimension, and `nn.Conv2d` with one group, channels first."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, module_name: str) -> None:
        super().__init__()
        WeightLayer.__init__(self, base_layer)
        self.channel_dim = 1 if isinstance(self.get_base_layer(), nn.Conv2d) else -1
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    forward = WeightLayer.forward

    def update_layer(self, adapter_name: str, config: Any, module_name: str) -> None:
        """Add an adapter, or replace the one of this name."""
        raise NotImplementedError

    def _take_up(self, adapter_name: str, config: Any, shape: tuple[int, ...], deviation: float) -> None:
        change = Change(shape, 0.0 if config.init_weights else deviation, self._vector_dtype())
        self._place(adapter_name, change, self._dicts()[0])
        self.r[adapter_name] = shape[0]
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


class NaiveLayer(_TunerLayer):
    """W' = W R^T, R block-diagonal and free: the layer's input x, as a row, becomes x R. Adapters do not commute."""

    method: ClassVar[str] = "Naive"
    adapter_layer_names = ("naive_blocks",)
    naive_blocks: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: NaiveConfig, module_name: str) -> None:
        """Add an adapter, or replace the one of this name."""
        base_layer, blocks = self.get_base_layer(), config.blocks_of(module_name)
        problem = layer_problem(module_name, base_layer, self.method, divided_features(base_layer), blocks)
        if problem:
            raise ValueError(problem)
        width = self.in_features // blocks
        self._take_up(adapter_name, config, (blocks, width, width), 0.3 / math.sqrt(width))

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        for name in reversed(names):  # the last adapter is the outermost: first on the input
            x = x + times_blocks(x, self._blocks(name), self.channel_dim)
        return self.base_layer(x, *args, **kwargs)

    def _blocks(self, name: str) -> Tensor:
        """By how much the blocks differ from the identity at the adapter's scale."""
        blocks, scale = self.naive_blocks[name](), self.scaling[name]
        return blocks if scale == 1 else scale * blocks

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        blocks = self.naive_blocks[name]()
        return times_blocks(weight.to(at_least_single(weight.dtype, blocks.dtype)), blocks.mT, dim=1)


class MagnitudeLayer(_TunerLayer):
    """W' = diag(s) W, one scale an output feature: the layer's output turns from z into b + s (z - b), b its bias."""

    method: ClassVar[str] = "Magnitude"
    adapter_layer_names = ("magnitude_rows",)
    magnitude_rows: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: MagnitudeConfig, module_name: str) -> None:
        """Add an adapter, or replace the one of this name."""
        problem = layer_problem(module_name, self.get_base_layer(), self.method)
        if problem:
            raise ValueError(problem)
        self._take_up(adapter_name, config, (self.out_features,), 0.3)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        z, bias = self.base_layer(x, *args, **kwargs), self._bias(x)
        for name in names:
            rows, scale = self.magnitude_rows[name](), self.scaling[name]
            z = scale_rows(z, rows if scale == 1 else scale * rows, bias, self.channel_dim)
        return z

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        rows = self.magnitude_rows[name]()
        return weight.to(at_least_single(weight.dtype, rows.dtype)) * rows.reshape(-1, *(1 for _ in weight.shape[1:]))


def divided_features(layer: nn.Module) -> tuple[int, ...]:
    """The input features of a layer, which Naive divides into blocks; none of a layer that cannot be adapted."""
    return layer_features(layer)[:1] if isinstance(layer, (nn.Linear, nn.Conv2d)) else ()

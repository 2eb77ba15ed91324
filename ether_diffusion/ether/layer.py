"""A frozen Linear or Conv2d whose input (and output) channels are transformed by ETHER or ETHER+."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import transform as T
from .config import EtherConfig
from .frozen import layer_features, layer_problem
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

    def forward(self) -> T.Change:
        """The transform's change of the identity, in at least single precision."""
        u = self.u.to(T.at_least_single(self.u.dtype))
        return T.ether(u) if self.v is None else T.ether_plus(u, self.v.to(u.dtype))


class EtherLayer(WeightLayer):
    """What Linear and Conv2d share: the adapters' vectors, and what they do to activations and to the weight.

    W' = H_out W H_in. Several active adapters do not commute.
    """

    method: ClassVar[str] = "ETHER"
    adapter_layer_names = ("ether_in", "ether_out")
    ether_in: nn.ModuleDict
    ether_out: nn.ModuleDict

    def update_layer(self, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        """Add an adapter, or replace the one of this name."""
        base_layer = self.get_base_layer()
        blocks, sides = config.blocks_of(module_name), config.sides_of(module_name)
        features = transformed_features(base_layer, sides)
        problem = layer_problem(module_name, base_layer, self.method, features, blocks, narrowest=NARROWEST)
        if problem:
            raise ValueError(problem)
        dtype = self._vector_dtype()
        for side, features in (("in", self.in_features), ("out", self.out_features)):
            if side == "out" and sides != "both":
                if adapter_name in self.ether_out:
                    del self.ether_out[adapter_name]
                continue
            planes = Hyperplanes(config.variant, features, blocks, config.init_weights, dtype)
            self._place(adapter_name, planes, self.ether_in if side == "in" else self.ether_out)
        self.r[adapter_name] = blocks
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        h_out = self.ether_out[name]() if name in self.ether_out else None
        return T.weight_change(weight, self.ether_in[name](), h_out)


class EtherLinear(nn.Module, EtherLayer):
    """ETHER on `nn.Linear`: x (..., in_features) -> (..., out_features)."""

    channel_dim = -1

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        super().__init__()
        EtherLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    forward = EtherLayer.forward


class EtherConv2d(nn.Module, EtherLayer):
    """ETHER on `nn.Conv2d` with one group, over channels: x (B, in_channels, H, W) -> (B, out_channels, H', W')."""

    channel_dim = 1

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        super().__init__()
        EtherLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    forward = EtherLayer.forward


NARROWEST = 2
"""Blocks one wide would be degenerate: a unit vector of one entry is a sign."""


def transformed_features(layer: nn.Module, sides: str) -> tuple[int, ...]:
    """Numbers of features on the sides of a layer that are transformed; none of a layer that cannot be."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return ()
    return layer_features(layer)[: 2 if sides == "both" else 1]

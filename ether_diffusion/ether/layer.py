"""A frozen Linear or Conv2d whose input (and output) features are transformed by ETHER or ETHER+."""

from __future__ import annotations

import math
from typing import Any, ClassVar

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

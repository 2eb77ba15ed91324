"""A frozen Linear or Conv2d with Naive adapters (its input times free blocks) or magnitudes (scales of its rows)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ether_diffusion.ether.transform import at_least_single
from ether_diffusion.ether.weight_layer import WeightLayer

from .config import MagnitudeConfig, NaiveConfig


class Change(nn.Module):
    """The trained difference of the blocks R_i from the identity, or of the scales from 1. It starts at zero.

    Storing the difference means that an adapter changes no bit at its start, keeps its precision in a half dtype, and
    that weight decay pulls it towards the base, not towards a weight of zeros.

    A module and not a bare parameter, so that hooks that load weights before `forward` (accelerate's offloading) fire.
    """

    def __init__(self, shape: tuple[int, ...], deviation: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape, dtype=dtype))
        if deviation:
            nn.init.normal_(self.change, std=deviation)

    def forward(self) -> Tensor:
        return self.change.to(at_least_single(self.change.dtype))


class NaiveLayer(WeightLayer):
    """W' = W R^T, R block-diagonal and free: the layer's input x, as a row, becomes x R. Adapters do not commute."""

    method: ClassVar[str] = "Naive"
    adapter_layer_names = ("naive_blocks",)
    naive_blocks: nn.ModuleDict

    @classmethod
    def divided_sides(cls, config: NaiveConfig, module_name: str) -> int:
        return 1

    def _make(self, config: NaiveConfig, module_name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        blocks = config.blocks_of(module_name)
        width = self.in_features // blocks
        deviation = 0.0 if config.init_weights else 0.3 / math.sqrt(width)
        return {"naive_blocks": Change((blocks, width, width), deviation, dtype)}

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        for name in reversed(names):  # the last adapter is the outermost: first on the input
            x = x + times_blocks(x, self._blocks(name), self.channel_dim)
        return self.base_layer(x, *args, **kwargs)

    def _blocks(self, name: str) -> Tensor:
        """The difference of the blocks from the identity at the adapter's scale."""
        blocks, scale = self.naive_blocks[name](), self.scaling[name]
        return blocks if scale == 1 else scale * blocks

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        blocks = self.naive_blocks[name]()
        return times_blocks(weight.to(at_least_single(weight.dtype, blocks.dtype)), blocks.mT, dim=1)


class MagnitudeLayer(WeightLayer):
    """W' = diag(s) W, one scale an output feature: the layer's output turns from z into b + s (z - b), b its bias."""

    method: ClassVar[str] = "Magnitude"
    adapter_layer_names = ("magnitude_rows",)
    magnitude_rows: nn.ModuleDict

    def _make(self, config: MagnitudeConfig, module_name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        return {"magnitude_rows": Change((self.out_features,), 0.0 if config.init_weights else 0.3, dtype)}

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        z, bias = self.base_layer(x, *args, **kwargs), self._bias(x)
        for name in names:
            rows, scale = self.magnitude_rows[name](), self.scaling[name]
            z = scale_rows(z, rows if scale == 1 else scale * rows, bias, self.channel_dim)
        return z

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        rows = self.magnitude_rows[name]()
        return weight.to(at_least_single(weight.dtype, rows.dtype)) * rows.reshape(-1, *(1 for _ in weight.shape[1:]))


def times_blocks(x: Tensor, blocks: Tensor, dim: int = -1) -> Tensor:
    """`x blockdiag(blocks)` for rows of features along `dim` of x, which has n * b entries; blocks: (n, b, b).

    Like the layer whose input this is, it computes in the dtype of x, or under autocast in that one: in single
    precision it would cost more than the layer itself. Takes 1/n of the work of a dense product, and never builds one.
    """
    n, b, _ = blocks.shape
    dim %= x.ndim
    blocks = blocks.to(x.dtype)
    if dim == x.ndim - 1:
        return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, (n, b)), blocks).flatten(-2)
    return (blocks.mT @ x.flatten(dim + 1).unflatten(dim, (n, b))).reshape(x.shape)


def scale_rows(z: Tensor, change: Tensor, fixed: Tensor | None, dim: int) -> Tensor:
    """`fixed + (1 + change) * (z - fixed)` for features along `dim` of z, in its dtype, computed in at least fp32.

    Args:
        change, fixed: One entry a feature. `fixed` is a layer's bias, which its rows' scales do not reach.
    """
    shape = (-1, *(1 for _ in range(z.ndim - 1 - dim % z.ndim)))
    change = change.to(at_least_single(z.dtype, change.dtype)).reshape(shape)
    # The product promotes a half-precision z by itself, so that autograd keeps z, and no copy of it in fp32.
    scaled = z * (1 + change)
    return (scaled if fixed is None else scaled - change * fixed.reshape(shape)).to(z.dtype)

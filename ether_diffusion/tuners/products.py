"""What Naive and magnitude adapters do to features: products with block-diagonal matrices, and scales of rows."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.ether.transform import at_least_single


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


def scale_rows(z: Tensor, change: Tensor, fixed: Tensor | None = None, dim: int = -1) -> Tensor:
    """`z + change * (z - fixed)` for features along `dim` of z: `1 + change` times each, about a point that stays.

    Args:
        change: One entry a feature.
        fixed: The same; a layer's bias, which its rows' scales do not reach. Default: the origin.

    Returns:
        In the dtype of z, computed in at least single precision.
    """
    return _ScaleRows.apply(z, change, fixed, dim)  # pyright: ignore[reportReturnType]


class _ScaleRows(torch.autograd.Function):
    """Autograd would do the same, but keep a copy of a half-precision z in single precision. This keeps z alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, change: Tensor, fixed: Tensor | None, dim: int) -> Tensor:
        with _no_autocast(z):
            dtype = at_least_single(z.dtype, change.dtype)
            along = _along(change, z, dim, dtype)
            wide = z.to(dtype)
            moved = wide if fixed is None else wide - _along(fixed, z, dim, dtype)
            return (wide + along * moved).to(z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        z, change, fixed, ctx.dim = inputs
        ctx.save_for_backward(z, change, fixed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, change, fixed = ctx.saved_tensors
        dz = d_change = d_fixed = None
        with _no_autocast(z):
            dtype = at_least_single(z.dtype, change.dtype)
            along, g = _along(change, z, ctx.dim, dtype), grads[0].to(dtype)
            others = [d for d in range(z.ndim) if d != ctx.dim % z.ndim]
            if ctx.needs_input_grad[0]:
                dz = (g + along * g).to(z.dtype)
            if ctx.needs_input_grad[1]:
                moved = z.to(dtype) if fixed is None else z.to(dtype) - _along(fixed, z, ctx.dim, dtype)
                d_change = (g * moved).sum(others).to(change.dtype)
            if fixed is not None and ctx.needs_input_grad[2]:
                d_fixed = (-change.to(dtype) * g.sum(others)).to(fixed.dtype)
        return dz, d_change, d_fixed, None


def _along(vector: Tensor, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """A vector of features in a shape that broadcasts along `dim` of x."""
    return vector.to(dtype).reshape(-1, *(1 for _ in range(x.ndim - 1 - dim % x.ndim)))


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()

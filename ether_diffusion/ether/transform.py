"""The hyperplane transforms of ETHER and ETHER+ as low-rank changes of the identity (paper, section 3).

A transform T is block-diagonal with n blocks of width b. Nothing here ever builds it: every T of the paper is the
identity plus a change of rank one or two per block, kept as two thin factors,

    T - I = blockdiag(left_i^T @ right_i)        left, right: (n, k, b)

    ETHER   H  = I - 2 u u^T         k = 1
    ETHER+  H+ = I - u u^T + v v^T   k = 2

Forward passes, merged weights, LoRA factors and distances all come from these factors.

Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024,
arXiv 2405.20271.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-12


class Change(NamedTuple):
    """`T - I` of a block-diagonal transform, as `left_i^T @ right_i` for each block i."""

    left: Tensor  # (n, k, b)
    right: Tensor  # (n, k, b)


def at_least_single(*dtypes: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in: double precision if any of these is, else single. Also for fp8 and unknown dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def unit(vectors: Tensor, eps: float = EPSILON) -> Tensor:
    """Scale each row to length one; a row shorter than `eps` is divided by `eps` instead, so that zeros stay finite."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(eps)


def ether(u: Tensor) -> Change:
    """Householder reflection `H - I = -2 u u^T` at the hyperplanes with normals u: (n, b), of any length but zero."""
    u = unit(u).unsqueeze(1)  # (n, 1, b)
    return Change(left=-2 * u, right=u)


def ether_plus(u: Tensor, v: Tensor) -> Change:
    """Relaxed reflection `H+ - I = v v^T - u u^T` for u, v: (n, b), of any length but zero.

    Written with the sum a = v + u and the difference d = v - u, as `(d a^T + a d^T) / 2`. At the start of training
    v = -u makes a exactly zero and with it, in any arithmetic, the whole change; near the start no two large outer
    products cancel.
    """
    u, v = unit(u), unit(v)
    a, d = v + u, v - u
    return Change(left=torch.stack((d, a), dim=1) * 0.5, right=torch.stack((a, d), dim=1))


def apply_change(change: Change, x: Tensor, dim: int = -1) -> Tensor:
    """`(T - I) x` along one dimension of x, which has n * b entries. T is symmetric, so this is also `x (T - I)`.

    Computed in the promoted dtype of the factors and x, outside of autocast. Costs O(k) operations an entry.
    """
    with _no_autocast(x.device.type):
        left, right, x = _promoted(*change, x)
        return _expand(_project(_blocks(x, left, dim), right), left).reshape(x.shape)


def transform(change: Change, x: Tensor, dim: int = -1, scale: float = 1.0, fixed: Tensor | None = None) -> Tensor:
    """`x + scale (T - I)(x - fixed)` along one dimension of x: the transform itself at scale 1. Keeps the dtype of x.

    `fixed`: n * b entries of the point that stays where it is, the origin by default. A layer's output turns about its
    bias.
    """
    left, right = change
    with _no_autocast(x.device.type):
        if scale != 1:
            left = scale * left
        # Taken off the k dot products of a block, so that no copy of x is made for the difference.
        offset = None if fixed is None else _project(_blocks(fixed.to(right), right), right)  # (n, k, 1)
    return _Transform.apply(x, left, right, offset, dim)  # pyright: ignore[reportReturnType]


class _Transform(torch.autograd.Function):
    """`x + left^T (right x - offset)` in each block.

    Autograd would do the same, but for what it keeps for the backward pass: for each layer that shares a
    half-precision x, a copy of x in single precision. This keeps x alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, left: Tensor, right: Tensor, offset: Tensor | None, dim: int) -> Tensor:
        with _no_autocast(x.device.type):
            left, right, wide = _promoted(left, right, x)
            dots = _project(_blocks(wide, left, dim), right, offset)
            return _add(wide, _expand(dots, left)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, left, right, offset, ctx.dim = inputs
        ctx.save_for_backward(x, left, right, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, offset = ctx.saved_tensors
        dx = d_left = d_right = d_offset = None
        with _no_autocast(x.device.type):
            factors = left.dtype
            left, right, g = _promoted(left, right, grads[0])
            g_blocks = _blocks(g, left, ctx.dim)
            g_dots = _project(g_blocks, left)
            if ctx.needs_input_grad[0]:
                dx = _add(g, _expand(g_dots, right)).to(x.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                x_blocks = _blocks(x.to(g.dtype), left, ctx.dim)
                d_left = _outer(_project(x_blocks, right, offset), g_blocks).to(factors)
                d_right = _outer(g_dots, x_blocks).to(factors)
            if ctx.needs_input_grad[3]:
                d_offset = -torch.einsum("...nks->nk", g_dots).unsqueeze(-1).to(factors)
        return dx, d_left, d_right, d_offset, None


def transform_weight(weight: Tensor, change_in: Change, change_out: Change | None = None, scale: float = 1.0) -> Tensor:
    """Weight of the adapted layer, `W + scale (T_out W T_in - W)`, for a weight (out, in) or (out, in, kh, kw).

    Returned in the dtype of the computation, promote(weight, factors), so that the caller rounds once.
    """
    weight = _promoted(weight, change_in.left)[0]
    return weight + scale * weight_change(weight, change_in, change_out)


def weight_change(weight: Tensor, change_in: Change, change_out: Change | None = None) -> Tensor:
    """`T_out W T_in - W` for a weight (out, in) or (out, in, kh, kw), in the promoted dtype."""
    delta = apply_change(change_in, weight, dim=1)
    if change_out is None:
        return delta
    return delta + apply_change(change_out, weight + delta, dim=0)


def low_rank(weight: Tensor, change_in: Change, change_out: Change | None = None) -> tuple[Tensor, Tensor]:
    """Factors (B, A) with `B @ A = T_out W T_in - W`, exact up to rounding, for a weight (out, in).

    Rank n k on the input side; the output side adds as much: 1 or 2 for ETHER and ETHER+ with one block on one side,
    4 for ETHER+ on both. Shapes: B (out, rank), A (rank, in).
    """
    weight = _promoted(weight, change_in.left)[0]
    in_left, in_right = (torch.block_diag(*factor) for factor in change_in)  # (n k, in)
    b_in = weight @ in_left.T
    if change_out is None:
        return b_in, in_right
    out_left, out_right = (torch.block_diag(*factor) for factor in change_out)  # (n k, out)
    b_in = transform(change_out, b_in, dim=0)
    return torch.cat((b_in, out_left.T), dim=1), torch.cat((in_right, out_right @ weight), dim=0)


def distance(change: Change) -> Tensor:
    """Frobenius distance `||T - I||_F`, a scalar: 2 sqrt(n) for ETHER, at most sqrt(2 n) for ETHER+."""
    left, right = change
    # ||L^T R||_F^2 = tr((L L^T)(R R^T)), a k x k computation.
    squared = ((left @ left.mT) * (right @ right.mT)).sum()
    return squared.clamp_min(0).sqrt()


# Blocks are (..., n, b, s) and dots (..., n, k, s), with s positions after the transformed dimension: 1 for a linear
# layer, H W for a convolution. Each form of the products is 2 to 40 times slower than the other where it is not used.


def _blocks(x: Tensor, factor: Tensor, dim: int = -1) -> Tensor:
    n, _, b = factor.shape
    dim %= x.ndim
    x = x.unsqueeze(-1) if dim == x.ndim - 1 else x.flatten(dim + 1)
    return x.unflatten(dim, (n, b))


def _project(blocks: Tensor, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    dots = torch.einsum("...nbs,nkb->...nks", blocks, factor) if blocks.shape[-1] == 1 else factor @ blocks
    return dots if offset is None else dots - offset.to(dots.dtype)


def _expand(dots: Tensor, factor: Tensor) -> Tensor:
    return torch.einsum("...nks,nkb->...nbs", dots, factor)


def _outer(dots: Tensor, blocks: Tensor) -> Tensor:
    if blocks.shape[-1] == 1:
        return torch.einsum("...nks,...nbs->nkb", dots, blocks)
    products = dots @ blocks.mT
    return products.sum(list(range(products.ndim - 3))) if products.ndim > 3 else products


def _add(x: Tensor, change: Tensor) -> Tensor:
    """`x + change` in the memory of the change, unless that would lose the memory format of x."""
    change = change.reshape(x.shape)
    return change.add_(x) if x.is_contiguous() and change.is_contiguous() else x + change


def _promoted(*tensors: Tensor) -> list[Tensor]:
    dtype = at_least_single(*(t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Dot products stay in the factors' precision where the model around them runs under autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

"""The hyperplane transforms of ETHER and ETHER+ as low-rank changes of the identity (paper, section 3).

A transform T is block-diagonal with n blocks of width b. Nothing here ever builds it: every T of the paper is the
identity plus a change of rank one or two per block, kept as two thin factors,

    T - I = blockdiag(left_i^T @ right_i)        left, right: (n, k, b)

    ETHER   H  = I - 2 u u^T         k = 1
    ETHER+  H+ = I - u u^T + v v^T   k = 2

`_rows` states these two formulas. Merged weights, LoRA factors and distances come from the factors that it gives;
forward passes from the same rows, with a derivative written by hand: on a GPU, a training step of a small batch costs
as many kernels as it launches, and autograd's derivative of a normalised vector alone launches ten.

Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024,
arXiv 2405.20271.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-12
WIDEST = 16384
"""The widest block that a Triton program takes."""


class Change(NamedTuple):
    """`T - I` of a block-diagonal transform, as `left_i^T @ right_i` for each block i."""

    left: Tensor  # (n, k, b)
    right: Tensor  # (n, k, b)


class Reflection(NamedTuple):
    """A transform of the paper: its vectors, (n, b) each; without v, ETHER.

    `near_u` and `near_v` are the same numbers as constants. They are on the device of the layer, where offloaded
    vectors are only while their module is called.
    """

    u: Tensor
    v: Tensor | None
    near_u: Tensor
    near_v: Tensor | None

    @property
    def left(self) -> Tensor:
        return _factors(self).left

    @property
    def right(self) -> Tensor:
        return _factors(self).right


AnyChange = Change | Reflection


def ether(u: Tensor) -> Reflection:
    """Householder reflection `H - I = -2 u u^T` at the hyperplanes with normals u: (n, b), of any length but zero."""
    return Reflection(u, None, u.detach(), None)


def ether_plus(u: Tensor, v: Tensor) -> Reflection:
    """Relaxed reflection `H+ - I = v v^T - u u^T` for u, v: (n, b), of any length but zero.

    Computed with the sum a = v + u and the difference d = v - u, as `(d a^T + a d^T) / 2`. At the start of training
    v = -u makes a exactly zero and with it, in any arithmetic, the whole change; near the start no two large outer
    products cancel.
    """
    return Reflection(u, v, u.detach(), v.detach())


def at_least_single(*dtypes: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in: double precision if any of these is, else single. Also for fp8 and unknown dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def unit(vectors: Tensor, eps: float = EPSILON) -> Tensor:
    """Scale each row to length one; a row shorter than `eps` is divided by `eps` instead, so that zeros stay finite."""
    return vectors / _lengths(vectors, eps)


def _lengths(vectors: Tensor, eps: float = EPSILON) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(eps)


def _rows(u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formulas: the rows that both factors consist of, (rows, n, b), and the vectors' lengths, (1 or 2, n, 1).

    ETHER: u. ETHER+: a, d, a, v, u. Any two neighbours of the first three are both a factor and, in the other order,
    the other factor: no product needs a copy of them.
    """
    vectors = u.unsqueeze(0) if v is None else torch.stack((v, u))
    lengths = _lengths(vectors)
    units = vectors / lengths
    if v is None:
        return units, lengths
    a, d = units[:1] + units[1:], units[:1] - units[1:]
    return torch.cat((a, d, a, units)), lengths


def _rows_in(dtype: torch.dtype, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    return _rows(u.to(dtype), None if v is None else v.to(dtype))


def _factors(change: AnyChange) -> Change:
    if isinstance(change, Change):
        return change
    u, v, near_u, near_v = change
    trains = torch.is_grad_enabled() and (u.requires_grad or (v is not None and v.requires_grad))
    rows = (_rows(u, v) if trains else _rows(near_u, near_v))[0].transpose(0, 1)
    if v is None:
        return Change(left=-2 * rows, right=rows)
    return Change(left=0.5 * rows[:, 1:3], right=rows[:, :2])


def apply_change(change: AnyChange, x: Tensor, dim: int = -1) -> Tensor:
    """`(T - I) x` along one dimension of x, which has n * b entries. T is symmetric, so this is also `x (T - I)`.

    Computed in the promoted dtype of the factors and x, outside of autocast. Costs O(k) operations an entry.
    """
    with _no_autocast(x.device.type):
        left, right, x = _promoted(*_factors(change), x)
        left, right = left.transpose(0, 1), right.transpose(0, 1)
        return _expand(_dots(right, _blocks(x, right, dim)), left).reshape(x.shape)


def transform(
    reflection: Reflection, x: Tensor, dim: int = -1, scale: float = 1.0, fixed: Tensor | None = None
) -> Tensor:
    """`x + scale (T - I)(x - fixed)` along one dimension of x: the transform itself at scale 1. Keeps the dtype of x.

    `fixed`: n * b entries of the point that stays where it is, the origin by default. A layer's output turns about its
    bias.
    """
    u, v, near_u, near_v = reflection
    if fixed is not None:  # offloaded biases may be on another device
        fixed = fixed.to(near_u.device, at_least_single(x.dtype, near_u.dtype))
    rows = lengths = None
    if not (_kernels(near_u, x) and _is_last(x, dim)):
        with torch.no_grad():
            rows, lengths = _rows_in(at_least_single(x.dtype, near_u.dtype), near_u, near_v)
    inputs = (x, u, v, fixed, near_u, near_v, rows, lengths, scale, dim)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _Transform.apply(*inputs)[0]  # pyright: ignore[reportOptionalSubscript]
    if not torch.is_grad_enabled():
        return _Transform.forward(*inputs)[0]
    return _PlainTransform.apply(*inputs)[0]  # pyright: ignore[reportOptionalSubscript]


def rows_each(u: Tensor, v: Tensor | None) -> Tensor:
    """The coefficients of G transforms, (G, k, n, b), from their vectors (G, n, b): u, or v + u and v - u of unit ones.

    They take as much memory as the vectors do. Coefficients of zeros are the identity, exactly.
    """
    return _rows(u, v)[0][: 1 if v is None else 2].transpose(0, 1)


def vectors_each(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Unit vectors u and v, (G, n, b) each, of coefficients (G, k, n, b) as `rows_each` makes them."""
    first, *others = rows.unbind(1)
    return (first, None) if not others else ((first - others[0]) / 2, (first + others[0]) / 2)


def transform_each(
    rows: Tensor, x: Tensor, dim: int = -1, scales: Tensor | None = None, fixed: Tensor | None = None
) -> Tensor:
    """As `transform`, with a transform of their own for each of G groups of samples. Keeps the dtype of x.

    Args:
        rows: (G, k, n, b), as `rows_each` makes them; G divides the samples of x, which stand group by group.
        x: (samples, ..., features) or (samples, channels, H, W), with `dim` as in `transform`.
        scales: (G,); one of 1 changes nothing.
    """
    dtype = at_least_single(x.dtype, rows.dtype)
    rows = rows.to(x.device, dtype)
    fixed = None if fixed is None else fixed.to(rows)
    scales = None if scales is None else scales.to(rows)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, rows, fixed)):
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        function = _TransformEach if traced else _PlainTransformEach
        return function.apply(x, rows, fixed, scales, dim)[0]  # pyright: ignore[reportOptionalSubscript]
    return _transformed_each(x, rows, fixed, scales, dim)[0]


def _transformed_each(
    x: Tensor, rows: Tensor, fixed: Tensor | None, scales: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    with _no_autocast(x.device.type):
        groups = _grouped(x.to(rows.dtype), rows, x, dim)
        dots = _dots_each(groups, rows, fixed)
        return _restored(_moved_each(groups, dots, rows, scales), x, dim), dots


class _TransformEach(torch.autograd.Function):
    """As `_Transform`, with the coefficients as an input: autograd's own derivative makes vectors' gradients of theirs.

    Both derivatives are those of `_Transform`, group by group.
    """

    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, fixed: Tensor | None, scales: Tensor | None, dim: int
    ) -> tuple[Tensor, Tensor]:
        return _transformed_each(x, rows, fixed, scales, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.dim = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, rows, fixed, scales, dots = ctx.saved_tensors
        needs_x, needs_rows, needs_fixed = ctx.needs_input_grad[:3]
        dx = d_rows = d_fixed = None
        if grads[0] is None:
            return (None,) * 5
        with _no_autocast(x.device.type):
            g = _grouped(grads[0].to(rows.dtype), rows, x, ctx.dim)
            g_dots = _dots_each(g, rows)
            if needs_x:
                dx = _restored(_moved_each(g, g_dots, rows, scales), x, ctx.dim)
            if needs_rows:
                groups = _grouped(x.to(rows.dtype), rows, x, ctx.dim)
                if torch.is_grad_enabled():  # a second derivative follows, and the dots depend on the inputs
                    dots = _dots_each(groups, rows, fixed)
                d_rows = _outer_each(dots, g, rows) + _outer_each(g_dots, groups, rows)
                if fixed is not None:
                    d_rows = torch.addcmul(d_rows, _total_each(g_dots, rows), fixed.view(rows.shape[2:]), value=-1)
                d_rows = _weighted(d_rows, rows, scales)
            if fixed is not None and needs_fixed:
                d_fixed = -_weighted(_total_each(g_dots, rows) * rows, rows, scales).sum((0, 1)).view(fixed.shape)
        return dx, d_rows, d_fixed, None, None


class _Transform(torch.autograd.Function):
    """`x + scale (T - I)(x - fixed)`, with a derivative of few kernels.

    Of the size of x it keeps x alone for the backward pass: no copy in single precision of a half-precision x, nothing
    of the output. Its second output is for the backward pass too: the dot products of x, one or two a block. The
    gradients of u and v include those of the rows that they make. Without rows the Triton kernels run, which make
    them of the vectors as they go.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        u: Tensor,
        v: Tensor | None,
        fixed: Tensor | None,
        near_u: Tensor,
        near_v: Tensor | None,
        rows: Tensor | None,
        lengths: Tensor | None,
        scale: float,
        dim: int,
    ) -> tuple[Tensor, Tensor]:
        if rows is None:
            strength = scale * _STRENGTHS[1 if v is None else 2]
            y = _kernels(near_u, x).forward(_matrix(x, dim).contiguous(), near_u, near_v, fixed, strength, EPSILON)
            return _restored(y, x, dim), near_u.new_empty(0)
        with _no_autocast(x.device.type):
            blocks = _arranged(x.to(rows.dtype), rows, x, dim)
            dots = _dots(_probes(rows), blocks, fixed)
            return _restored(_moved(blocks, dots, rows, scale), x, dim), dots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.scale, ctx.dim = inputs
        dots = output[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(dots)
        ctx.save_for_backward(*tensors, dots if dots.numel() else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, u, v, fixed, near_u, near_v, rows, lengths, dots = ctx.saved_tensors
        needs_x, needs_u, needs_v, needs_fixed = ctx.needs_input_grad[:4]
        dx = du = dv = d_fixed = None
        if grads[0] is None:
            return (None,) * 10
        k = 1 if v is None else 2
        strength = ctx.scale * _STRENGTHS[k]
        if rows is None and not torch.is_grad_enabled() and not needs_fixed:
            matrices = [_matrix(t, ctx.dim).contiguous() for t in (x, grads[0].to(x.dtype))]
            kernels = _kernels(near_u, x)
            dx, du, dv = kernels.backward(*matrices, near_u, near_v, fixed, strength, EPSILON, needs_x)
            dx = None if dx is None else _restored(dx, x, ctx.dim)
            dv = None if v is None else dv.to(v.dtype)
            return dx, du.to(u.dtype), dv, *(None,) * 7
        with _no_autocast(x.device.type):
            if torch.is_grad_enabled():  # a second derivative follows, and rows and dots depend on the inputs
                (rows, lengths), dots = _rows_in(at_least_single(x.dtype, near_u.dtype), u, v), None
            elif rows is None:
                rows, lengths = _rows_in(near_u.dtype, near_u, near_v)
            g = _arranged(grads[0].to(rows.dtype), rows, x, ctx.dim)
            g_dots = _dots(_probes(rows), g)
            if needs_x:
                dx = _restored(_moved(g, g_dots, rows, ctx.scale), x, ctx.dim)
            if needs_u or needs_v:
                blocks = _arranged(x.to(rows.dtype), rows, x, ctx.dim)
                dots = _dots(_probes(rows), blocks, fixed) if dots is None else dots
                # Of the rows that the change consists of first, then of the unit vectors that these consist of.
                d_units = _sums(dots, g, g_dots, blocks, strength)
                if fixed is not None:
                    d_units = torch.addcmul(d_units, _total(g_dots), fixed.view(u.shape), value=-strength)
                if v is not None:
                    d_a, d_d = d_units[:1], d_units[1:]
                    d_units = torch.cat((d_a + d_d, d_a - d_d))
                # The length of a vector changes nothing, so its gradient has no part along it.
                units = rows[-k:]
                along = (units.unsqueeze(-2) @ d_units.unsqueeze(-1)).squeeze(-1)
                d_vectors = torch.addcmul(d_units, units, along, value=-1) / lengths
                du, dv = d_vectors[-1].to(u.dtype), None if v is None else d_vectors[0].to(v.dtype)
            if fixed is not None and needs_fixed:
                d_fixed = (-strength * (_total(g_dots) * rows[:k]).sum(0)).view(fixed.shape)
        return dx, du, dv, d_fixed, *(None,) * 6


def _plain(function: Any) -> Any:
    """The same in the older form of a function, which torch calls without binding names: half of a call's CPU time."""

    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    return type(f"_Plain{function.__name__}", (function,), members)


_PlainTransform, _PlainTransformEach = _plain(_Transform), _plain(_TransformEach)


def transform_weight(
    weight: Tensor, change_in: AnyChange, change_out: AnyChange | None = None, scale: float = 1.0
) -> Tensor:
    """Weight of the adapted layer, `W + scale (T_out W T_in - W)`, for a weight (out, in) or (out, in, kh, kw).

    Returned in the dtype of the computation, promote(weight, factors), so that the caller rounds once.
    """
    weight = _promoted(weight, change_in.left)[0]
    return weight + scale * weight_change(weight, change_in, change_out)


def weight_change(weight: Tensor, change_in: AnyChange, change_out: AnyChange | None = None) -> Tensor:
    """`T_out W T_in - W` for a weight (out, in) or (out, in, kh, kw), in the promoted dtype."""
    delta = apply_change(change_in, weight, dim=1)
    if change_out is None:
        return delta
    return delta + apply_change(change_out, weight + delta, dim=0)


def low_rank(weight: Tensor, change_in: AnyChange, change_out: AnyChange | None = None) -> tuple[Tensor, Tensor]:
    """Factors with `B @ A = T_out W T_in - W`, exact up to rounding, for a weight (out, in) or (out, in, kh, kw).

    Rank n k kh kw on the input side, since a transform before a kernel takes a factor at each of its positions; the
    output side adds n k. So ETHER and ETHER+ have 1 or 2 on one side of a linear layer with one block, ETHER+ on both
    4; on a 3 x 3 convolution 9, 18 and 20. Shapes: B (out, rank), A (rank, in) or (rank, in, kh, kw).
    """
    weight = _promoted(weight, change_in.left)[0]
    in_left, in_right = (torch.block_diag(*factor) for factor in _factors(change_in))  # (n k, in)
    positions = weight[0, 0].numel()
    at_each = torch.eye(positions, dtype=weight.dtype, device=weight.device)
    b_in = torch.einsum("oip,ri->orp", weight.reshape(*weight.shape[:2], positions), in_left).flatten(1)
    a_in = torch.einsum("ri,pq->rpiq", in_right, at_each).reshape(-1, *weight.shape[1:])
    if change_out is None:
        return b_in, a_in
    out_left, out_right = (torch.block_diag(*factor) for factor in _factors(change_out))  # (n k, out)
    b_in = b_in + apply_change(change_out, b_in, dim=0)
    a_out = torch.tensordot(out_right, weight, dims=1)
    return torch.cat((b_in, out_left.T), dim=1), torch.cat((a_in, a_out))


def distance(change: AnyChange) -> Tensor:
    """Frobenius distance `||T - I||_F`, a scalar: 2 sqrt(n) for ETHER, at most sqrt(2 n) for ETHER+."""
    left, right = _factors(change)
    # ||L^T R||_F^2 = tr((L L^T)(R R^T)), a k x k computation.
    squared = ((left @ left.mT) * (right @ right.mT)).sum()
    return squared.clamp_min(0).sqrt()


def _kernels(u: Tensor, x: Tensor) -> Any:
    """The Triton kernels for these tensors, or None where the plain version runs: off CUDA, compiled, under vmap, …"""
    if not (u.is_cuda and x.is_cuda) or torch.compiler.is_compiling():
        return None
    mapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]
    plain = type(x) in (Tensor, torch.nn.Parameter) and not mapped
    fits = u.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return _load_kernels(x.device.index) if plain and fits and u.shape[-1] <= WIDEST else None


@functools.cache
def _load_kernels(device: int) -> Any:
    try:
        from . import kernels

        kernels.check(torch.device("cuda", device))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"ETHER's Triton kernels do not work here, the slower plain version runs: {reason}", stacklevel=2)
        return None
    return kernels


_STRENGTHS = {1: -2.0, 2: 0.5}
"""What the product of the factors' rows is multiplied with, by the rank of a block's change."""


# x is arranged as blocks (..., n, b, s), with s positions after the transformed dimension: 1 for a linear layer, H W
# for a convolution; or, with one block along the last dimension, as a matrix (T, b). Dots are (k, ..., n, s) or (k, T),
# for k rows (k, n, b). Each form of the products is 2 to 40 times slower than the others where it is not used.


def _arranged(x: Tensor, rows: Tensor, like: Tensor, dim: int) -> Tensor:
    if not _is_last(like, dim):
        return _blocks(x, rows, dim)
    return _matrix(x, dim) if rows.shape[1] == 1 else _blocks(x.movedim(dim, -1), rows)


def _matrix(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def _restored(arranged: Tensor, like: Tensor, dim: int) -> Tensor:
    if _is_last(like, dim):
        return arranged.reshape(like.movedim(dim, -1).shape).movedim(-1, dim).to(like.dtype)
    return arranged.reshape(like.shape).to(like.dtype)


def _is_last(x: Tensor, dim: int) -> bool:
    """Whether the transformed dimension is the last one, or the fastest in memory (a convolution in channels-last)."""
    return dim % x.ndim == x.ndim - 1 or (not x.is_contiguous() and x.movedim(dim, -1).is_contiguous())


def _blocks(x: Tensor, rows: Tensor, dim: int = -1) -> Tensor:
    dim %= x.ndim
    x = x.unsqueeze(-1) if dim == x.ndim - 1 else x.flatten(dim + 1)
    return x.unflatten(dim, rows.shape[1:])


def _probes(rows: Tensor) -> Tensor:
    """The rows whose dot products with x the change multiplies its rows with: u, or d and a."""
    return rows if len(rows) == 1 else rows[1:3]


def _dots(rows: Tensor, x: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Dot products of the rows with `x - fixed`, without a copy of x for the difference."""
    if x.ndim == 2 and torch.compiler.is_compiling():  # Inductor fuses sums, and calls a library for products
        dots = torch.stack([(x * row).sum(-1) for row in rows.flatten(1)])
        return dots if fixed is None else dots - (rows.flatten(1) * fixed).sum(-1, keepdim=True)
    if x.ndim == 2:
        matrix = rows[:, 0]
        return matrix @ x.T if fixed is None else torch.addmm((matrix @ fixed).unsqueeze(1), matrix, x.T, beta=-1)
    if x.shape[-1] == 1:
        dots = torch.einsum("...nbs,knb->k...ns", x, rows)
    else:
        dots = (rows.transpose(0, 1) @ x).movedim(-2, 0)
    if fixed is None:
        return dots
    offset = torch.einsum("knb,nb->kn", rows, fixed.view(rows.shape[1:]))
    return dots - offset.view(len(rows), *(1 for _ in range(dots.ndim - 3)), -1, 1)


def _moved(x: Tensor, dots: Tensor, rows: Tensor, scale: float) -> Tensor:
    """`x + scale (T - I)(...)`, from the dot products of what the change is applied to."""
    k = 1 if len(rows) == 1 else 2
    strength = scale * _STRENGTHS[k]
    if x.ndim > 2:
        return torch.add(x, _expand(dots, rows[:k]), alpha=strength)
    if torch.compiler.is_compiling():
        return x + strength * sum(dot.unsqueeze(-1) * row for dot, row in zip(dots, rows[:k, 0], strict=True))
    if k == 1:
        return torch.addr(x, dots[0], rows[0, 0], alpha=strength)
    return torch.addmm(x, dots.T, rows[:k, 0], alpha=strength)


def _expand(dots: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("k...ns,knb->...nbs", dots, rows)


def _sums(dots: Tensor, x: Tensor, more: Tensor, y: Tensor, weight: float) -> Tensor:
    """`weight` times the sum over all positions of `dots x + more y`: (k, n, b)."""
    if x.ndim == 2 and torch.compiler.is_compiling():
        return weight * (dots.unsqueeze(-1) * x + more.unsqueeze(-1) * y).sum(1).unsqueeze(1)
    if x.ndim == 2:
        return torch.addmm(dots @ x, more, y, beta=weight, alpha=weight).unsqueeze(1)
    return weight * (_outer(dots, x) + _outer(more, y))


def _outer(dots: Tensor, x: Tensor) -> Tensor:
    if x.shape[-1] == 1:
        return torch.einsum("k...ns,...nbs->knb", dots, x)
    return (dots.movedim(0, -2) @ x.mT).flatten(0, -4).sum(0).transpose(0, 1)


def _total(dots: Tensor) -> Tensor:
    """The sum of dots over all positions: (k, n, 1)."""
    if dots.ndim == 2:
        return dots.sum(1)[:, None, None]
    return dots.sum([*range(1, dots.ndim - 2), -1]).unsqueeze(-1)


# For a transform a group, x is arranged as (G, M, n b) with M positions a group, or for a convolution as (G, m, n, b,
# s) with m samples a group. Dots are (G, M, n k) or (G, m, n, k, s). For small x a call costs more than its arithmetic,
# so that there are as few as can be.

MOST_ROWS = 16
"""Rows of blocks that are multiplied as one matrix, with zeros where other blocks are: for more, that costs more."""


def _grouped(x: Tensor, rows: Tensor, like: Tensor, dim: int) -> Tensor:
    groups, _, n, b = rows.shape
    if _is_last(like, dim):
        x = x.movedim(dim, -1)
        return x if x.ndim == 3 and len(x) == groups else x.reshape(groups, -1, n * b)
    return x.reshape(groups, -1, n, b, math.prod(x.shape[dim % x.ndim + 1 :]))


def _probes_each(rows: Tensor) -> Tensor:
    """As `_probes`: u, or the two rows in the other order."""
    return rows if rows.shape[1] == 1 else rows.flip(1)


def _dots_each(x: Tensor, rows: Tensor, fixed: Tensor | None = None) -> Tensor:
    probes = _probes_each(rows)
    groups, k, n, b = rows.shape
    if x.ndim == 5:
        dots = probes.transpose(1, 2).unsqueeze(1) @ x
        if fixed is None:
            return dots
        return dots - (probes * fixed.view(n, b)).sum(-1).transpose(1, 2)[:, None, :, :, None]
    if torch.compiler.is_compiling():
        blocks = x.unflatten(-1, (n, b))
        dots = torch.stack([(blocks * row.unsqueeze(1)).sum(-1) for row in probes.unbind(1)], -1).flatten(2)
    elif n * k <= MOST_ROWS:
        matrix = probes.squeeze(2) if n == 1 else _spread(probes)
        if fixed is None:
            return torch.bmm(x, matrix.mT)
        return torch.baddbmm((matrix @ fixed).unsqueeze(1), x, matrix.mT, beta=-1)
    else:
        dots = torch.einsum("gmnb,gknb->gmnk", x.unflatten(-1, (n, b)), probes).flatten(2)
    if fixed is None:
        return dots
    return dots - (probes * fixed.view(n, b)).sum(-1).transpose(1, 2).reshape(groups, 1, n * k)


def _spread(rows: Tensor) -> Tensor:
    """Rows of blocks (G, k, n, b) as rows of all features, (G, n k, n b), with zeros in the other blocks."""
    groups, k, n, b = rows.shape
    matrix = rows.new_zeros(groups, n, k, n, b)
    matrix.diagonal(dim1=1, dim2=3).copy_(rows.permute(0, 1, 3, 2))
    return matrix.view(groups, n * k, n * b)


def _moved_each(x: Tensor, dots: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor:
    """As `_moved`."""
    _, k, n, b = rows.shape
    strength = _STRENGTHS[k]
    if scales is not None:
        dots = dots * scales.view(-1, *(1 for _ in dots.shape[1:]))
    if x.ndim == 5:
        return torch.add(x, rows.permute(0, 2, 3, 1).unsqueeze(1) @ dots, alpha=strength)
    if n == 1 and k == 2 and not torch.compiler.is_compiling():
        return torch.baddbmm(x, dots, rows.squeeze(2), alpha=strength)
    blocks, dots = (x, dots) if n == 1 else (x.unflatten(-1, (n, b)), dots.unflatten(-1, (n, k)))
    for index, row in enumerate((rows.squeeze(2) if n == 1 else rows).unbind(1)):
        blocks = torch.addcmul(blocks, dots[..., index : index + 1], row.unsqueeze(1), value=strength)
    return blocks if n == 1 else blocks.flatten(-2)


def _outer_each(dots: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """The sum over a group's positions of `dots x`: (G, k, n, b)."""
    _, k, n, b = rows.shape
    if x.ndim == 5:
        return (dots @ x.mT).sum(1).transpose(1, 2)
    if n == 1:
        return torch.bmm(dots.mT, x).unsqueeze(2)
    return torch.einsum("gmnk,gmnb->gknb", dots.unflatten(-1, (n, k)), x.unflatten(-1, (n, b)))


def _total_each(dots: Tensor, rows: Tensor) -> Tensor:
    """The sum of dots over a group's positions: (G, k, n, 1)."""
    totals = dots.sum((1, 4)) if dots.ndim == 5 else dots.sum(1).unflatten(-1, (rows.shape[2], rows.shape[1]))
    return totals.transpose(1, 2).unsqueeze(-1)


def _weighted(gradients: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor:
    gradients = _STRENGTHS[rows.shape[1]] * gradients
    return gradients if scales is None else gradients * scales.view(-1, 1, 1, 1)


def _promoted(*tensors: Tensor) -> list[Tensor]:
    dtype = at_least_single(*(t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Dot products stay in the factors' precision where the model around them runs under autocast."""
    if torch.compiler.is_compiling():  # older versions of torch cannot trace the questions
        needed = device_type != "meta"
    else:
        needed = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if needed:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

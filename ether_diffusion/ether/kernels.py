"""`transform.py` in Triton, for layers on CUDA: one read and one write of x a pass, and three launches a side and step.

The formulas are those of `transform._rows` and `transform._Transform`, which stay what these kernels are tested against
and what runs everywhere else. Nothing imports this module before a tensor on CUDA needs it.

x is (T, n b): T positions of n blocks of width b. A program takes one block of some positions. It makes the unit
vectors of its block by itself: these are a few thousand numbers, next to a launch that would make them for all.
"""

# Triton's own types know neither how a kernel is called nor how its tensors are indexed.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOptionalOperand=false

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
"""Most partial sums a block that the backward pass writes, and so most programs that it starts for a block."""
TILE = 8192
"""About how many entries of x a program has in registers."""


@triton.jit
def _length(vector, eps):
    return tl.maximum(tl.sqrt(tl.sum(vector * vector)), eps)


@triton.jit
def _unit(vector, place, inside, eps):
    values = tl.load(vector + place, inside, 0.0).to(tl.float32)
    return values / _length(values, eps)


@triton.jit
def _forward_kernel(
    x, u, v, fixed, y, T, n, b, strength, eps,
    PLUS: tl.constexpr, FIXED: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    t = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    inside = columns < b
    here = block * b + columns
    mask = (t < T)[:, None] & inside[None, :]
    place = t.to(tl.int64)[:, None] * (n * b) + here[None, :]
    values = tl.load(x + place, mask, 0.0).to(tl.float32)
    moved = values
    if FIXED:
        moved = values - tl.load(fixed + here, inside, 0.0).to(tl.float32)[None, :]
    unit_u = _unit(u, here, inside, eps)
    if PLUS:
        unit_v = _unit(v, here, inside, eps)
        first = unit_v + unit_u
        second = unit_v - unit_u
        dots = tl.sum(moved * second[None, :], 1)
        others = tl.sum(moved * first[None, :], 1)
        change = dots[:, None] * first[None, :] + others[:, None] * second[None, :]
    else:
        change = tl.sum(moved * unit_u[None, :], 1)[:, None] * unit_u[None, :]
    tl.store(y + place, (values + strength * change).to(y.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x, g, u, v, fixed, dx, partial, T, n, b, strength, eps,
    PLUS: tl.constexpr, FIXED: tl.constexpr, NEEDS_X: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    inside = columns < b
    here = block * b + columns
    side = n * b
    sum_v = tl.zeros((WIDTH,), tl.float32)
    sum_u = tl.zeros((WIDTH,), tl.float32)
    unit_u = _unit(u, here, inside, eps)
    if PLUS:
        unit_v = _unit(v, here, inside, eps)
        first = unit_v + unit_u
        second = unit_v - unit_u
    for start in range(program * HEIGHT, T, tl.num_programs(0) * HEIGHT):
        t = start + tl.arange(0, HEIGHT)
        mask = (t < T)[:, None] & inside[None, :]
        place = t.to(tl.int64)[:, None] * side + here[None, :]
        gradient = tl.load(g + place, mask, 0.0).to(tl.float32)
        moved = tl.load(x + place, mask, 0.0).to(tl.float32)
        if FIXED:
            at = tl.load(fixed + here, inside, 0.0).to(tl.float32)
            moved = tl.where(mask, moved - at[None, :], 0.0)
        g_u = tl.sum(gradient * unit_u[None, :], 1)
        x_u = tl.sum(moved * unit_u[None, :], 1)
        sum_u += tl.sum(x_u[:, None] * gradient + g_u[:, None] * moved, 0)
        if PLUS:
            g_v = tl.sum(gradient * unit_v[None, :], 1)
            x_v = tl.sum(moved * unit_v[None, :], 1)
            sum_v += tl.sum(x_v[:, None] * gradient + g_v[:, None] * moved, 0)
        if NEEDS_X:
            if PLUS:
                dots = tl.sum(gradient * second[None, :], 1)
                others = tl.sum(gradient * first[None, :], 1)
                change = dots[:, None] * first[None, :] + others[:, None] * second[None, :]
            else:
                change = g_u[:, None] * unit_u[None, :]
            tl.store(dx + place, (gradient + strength * change).to(dx.dtype.element_ty), mask)
    if PLUS:
        tl.store(partial + (program * 2) * side + here, sum_v, inside)
        tl.store(partial + (program * 2 + 1) * side + here, sum_u, inside)
    else:
        tl.store(partial + program * side + here, sum_u, inside)


@triton.jit
def _finish_kernel(
    partial, u, v, du, dv, programs, n, b, weight, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    vector, block = tl.program_id(0), tl.program_id(1)  # v and u, or u alone
    columns = tl.arange(0, WIDTH)
    inside = columns < b
    here = block * b + columns
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, programs, HEIGHT):
        p = start + tl.arange(0, HEIGHT)
        mask = (p < programs)[:, None] & inside[None, :]
        place = p[:, None] * (K * n * b) + (vector * n * b + here)[None, :]
        total += tl.sum(tl.load(partial + place, mask, 0.0), 0)
    of_u, of_v = inside & (vector == K - 1), inside & (vector < K - 1)
    values = tl.load(u + here, of_u, 0.0).to(tl.float32) + tl.load(v + here, of_v, 0.0).to(tl.float32)
    length = _length(values, eps)
    unit = values / length
    gradient = weight * (total - unit * tl.sum(total * unit)) / length
    tl.store(du + here, gradient if K == 1 else -gradient, of_u)
    tl.store(dv + here, gradient, of_v)


def forward(x: Tensor, u: Tensor, v: Tensor | None, fixed: Tensor | None, strength: float, eps: float) -> Tensor:
    """`x + strength * (the change of x - fixed)` for a contiguous x (T, n b), in its dtype; vectors in fp32."""
    (n, b), T = u.shape, x.shape[0]
    y = torch.empty_like(x)
    width, height = _tile(b)
    u, v, at = _contiguous(u, v, fixed)
    with _device(x):
        _forward_kernel[(triton.cdiv(T, height), n)](
            x, u, u if v is None else v, u if at is None else at, y, T, n, b, strength, eps,
            v is not None, at is not None, width, height,
        )  # fmt: skip
    return y


def backward(
    x: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor | None,
    fixed: Tensor | None,
    strength: float,
    eps: float,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The gradients of x, u and v, for contiguous x and g (T, n b)."""
    (n, b), k, T = u.shape, 1 if v is None else 2, x.shape[0]
    # T - I is weight times the sum of the unit vectors' outer products, with a minus for u in ETHER+.
    weight = strength if k == 1 else 2 * strength
    dx = torch.empty_like(x) if needs_x else None
    width, height = _tile(b)
    programs = max(1, min(PROGRAMS, triton.cdiv(T, height)))
    partial = u.new_empty((programs, k, n, b))
    du, dv = u.new_empty((n, b)), None if v is None else u.new_empty((n, b))
    u, v, at = _contiguous(u, v, fixed)
    any_v = u if v is None else v
    with _device(x):
        _backward_kernel[(programs, n)](
            x, g, u, any_v, u if at is None else at, g if dx is None else dx, partial, T, n, b, strength, eps,
            k > 1, at is not None, needs_x, width, height,
        )  # fmt: skip
        _finish_kernel[(k, n)](
            partial, u, any_v, du, du if dv is None else dv, programs, n, b, weight, eps, k, width, height
        )
    return dx, du, dv


def check(device: torch.device) -> None:
    """Try the kernels on this device.

    Raises:
        RuntimeError: they give other numbers than the formula. Or whatever Triton raises where it cannot compile.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        u, v, x, g = (
            torch.randn(shape, generator=generator).to(device) for shape in ((1, 20), (1, 20), (70, 20), (70, 20))
        )
        units = {sign: vector[0] / vector.norm() for sign, vector in ((1, v), (-1, u))}
        a, d = units[1] + units[-1], units[1] - units[-1]
        error = (forward(x, u, v, None, 0.5, 1e-12) - x - ((x @ a).outer(d) + (x @ d).outer(a)) / 2).abs().max()
        dx, du, dv = backward(x, g, u, v, None, 0.5, 1e-12, True)
        assert dx is not None
        assert dv is not None
        error += (dx - g - ((g @ a).outer(d) + (g @ d).outer(a)) / 2).abs().max()
        for (sign, unit), vector, found in zip(units.items(), (v, u), (dv, du), strict=True):
            total = sign * (unit @ x.T @ g + unit @ g.T @ x)
            error += (found[0] - (total - unit * (total @ unit)) / vector.norm()).abs().max()
    if not error < 0.3:  # products may be rounded to ten bits, where the user allows TF32
        raise RuntimeError(f"they are off by {float(error):.1g}")


def _tile(b: int) -> tuple[int, int]:
    """Width and height of a tile, powers of two."""
    width = triton.next_power_of_2(b)
    return width, max(1, min(64, TILE // width))


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

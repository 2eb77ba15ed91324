"""`transform.py` in Triton, for layers on CUDA: one read and one write of x a pass, and four launches a side and step.

The formulas are those of `transform._rows` and `transform._Transform`, which stay what these kernels are tested against
and what runs everywhere else. Nothing imports this module before a tensor on CUDA needs it.

x is (T, n b): T positions of n blocks of width b. A program takes one block of some positions. Rows are as in
`transform._rows`: u, or a, d, a, v, u.
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
def _rows_kernel(u, v, rows, lengths, n, b, eps, PLUS: tl.constexpr, WIDTH: tl.constexpr):
    block = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    mask = columns < b
    place = block * b + columns
    units_u = tl.load(u + place, mask, 0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(units_u * units_u)), eps)
    units_u = units_u / length
    if PLUS:
        tl.store(lengths + n + block, length)
        units_v = tl.load(v + place, mask, 0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(units_v * units_v)), eps)
        units_v = units_v / length
        tl.store(lengths + block, length)
        side = n * b
        tl.store(rows + place, units_v + units_u, mask)
        tl.store(rows + side + place, units_v - units_u, mask)
        tl.store(rows + 2 * side + place, units_v + units_u, mask)
        tl.store(rows + 3 * side + place, units_v, mask)
        tl.store(rows + 4 * side + place, units_u, mask)
    else:
        tl.store(lengths + block, length)
        tl.store(rows + place, units_u, mask)


@triton.jit
def _forward_kernel(
    x, rows, fixed, y, T, n, b, strength,
    PLUS: tl.constexpr, FIXED: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    t = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    inside = columns < b
    mask = (t < T)[:, None] & inside[None, :]
    place = t.to(tl.int64)[:, None] * (n * b) + (block * b + columns)[None, :]
    values = tl.load(x + place, mask, 0.0).to(tl.float32)
    moved = values
    if FIXED:
        moved = values - tl.load(fixed + block * b + columns, inside, 0.0).to(tl.float32)[None, :]
    first = tl.load(rows + block * b + columns, inside, 0.0)
    if PLUS:
        second = tl.load(rows + (n + block) * b + columns, inside, 0.0)
        dots = tl.sum(moved * second[None, :], 1)
        others = tl.sum(moved * first[None, :], 1)
        change = dots[:, None] * first[None, :] + others[:, None] * second[None, :]
    else:
        change = tl.sum(moved * first[None, :], 1)[:, None] * first[None, :]
    tl.store(y + place, (values + strength * change).to(y.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x, g, rows, fixed, dx, partial, T, n, b, strength,
    PLUS: tl.constexpr, FIXED: tl.constexpr, NEEDS_X: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    program, block = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    inside = columns < b
    here = block * b + columns
    side = n * b
    first = tl.load(rows + here, inside, 0.0)
    sum_v = tl.zeros((WIDTH,), tl.float32)
    sum_u = tl.zeros((WIDTH,), tl.float32)
    if PLUS:
        second = tl.load(rows + side + here, inside, 0.0)
        unit_v = tl.load(rows + 3 * side + here, inside, 0.0)
        unit_u = tl.load(rows + 4 * side + here, inside, 0.0)
    else:
        unit_u = first
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
                change = g_u[:, None] * first[None, :]
            tl.store(dx + place, (gradient + strength * change).to(dx.dtype.element_ty), mask)
    if PLUS:
        tl.store(partial + (program * 2) * side + here, sum_v, inside)
        tl.store(partial + (program * 2 + 1) * side + here, sum_u, inside)
    else:
        tl.store(partial + program * side + here, sum_u, inside)


@triton.jit
def _finish_kernel(
    partial, units, lengths, d_vectors, programs, n, b, weight,
    K: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    vector, block = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    inside = columns < b
    here = (vector * n + block) * b + columns
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, programs, HEIGHT):
        p = start + tl.arange(0, HEIGHT)
        mask = (p < programs)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial + p[:, None] * (K * n * b) + here[None, :], mask, 0.0), 0)
    unit = tl.load(units + here, inside, 0.0)
    sign = tl.where(vector == 1, -weight, weight)  # u in ETHER+
    across = total - unit * tl.sum(total * unit)
    tl.store(d_vectors + here, sign * across / tl.load(lengths + vector * n + block), inside)


def rows_of(u: Tensor, v: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`transform._rows` of vectors in single precision: rows (1 or 5, n, b) and lengths (1 or 2, n, 1)."""
    n, b = u.shape
    plus = v is not None
    rows = u.new_empty((5 if plus else 1, n, b))
    lengths = u.new_empty((2 if plus else 1, n, 1))
    with _device(u):
        _rows_kernel[(n,)](
            u.contiguous(), v.contiguous() if plus else u, rows, lengths, n, b, eps, plus, triton.next_power_of_2(b)
        )
    return rows, lengths


def forward(x: Tensor, rows: Tensor, fixed: Tensor | None, strength: float) -> Tensor:
    """`x + strength * (the rows' change of x - fixed)` for a contiguous x (T, n b). In the dtype of x."""
    (_, n, b), T = rows.shape, x.shape[0]
    y = torch.empty_like(x)
    width, height = _tile(b)
    at = rows if fixed is None else fixed.contiguous()
    with _device(x):
        _forward_kernel[(triton.cdiv(T, height), n)](
            x, rows, at, y, T, n, b, strength, len(rows) > 1, fixed is not None, width, height
        )
    return y


def backward(
    x: Tensor,
    g: Tensor,
    rows: Tensor,
    lengths: Tensor,
    fixed: Tensor | None,
    strength: float,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of x and of the vectors, (v and u, or u; n, b), for contiguous x and g (T, n b)."""
    (_, n, b), k, T = rows.shape, len(lengths), x.shape[0]
    # T - I is weight times the sum of the unit vectors' outer products, with a minus for u in ETHER+.
    weight = strength if k == 1 else 2 * strength
    dx = torch.empty_like(x) if needs_x else None
    width, height = _tile(b)
    programs = max(1, min(PROGRAMS, triton.cdiv(T, height)))
    partial = rows.new_empty((programs, k, n, b))
    d_vectors = rows.new_empty((k, n, b))
    at = rows if fixed is None else fixed.contiguous()
    with _device(x):
        _backward_kernel[(programs, n)](
            x, g, rows, at, g if dx is None else dx, partial, T, n, b, strength,
            k > 1, fixed is not None, needs_x, width, height,
        )  # fmt: skip
        _finish_kernel[(k, n)](partial, rows[-k:], lengths, d_vectors, programs, n, b, weight, k, width, height)
    return dx, d_vectors


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
        rows, lengths = rows_of(u, v, 1e-12)
        a, d = rows[0, 0], rows[1, 0]
        error = (forward(x, rows, None, 0.5) - x - ((x @ a).outer(d) + (x @ d).outer(a)) / 2).abs().max()
        dx, d_vectors = backward(x, g, rows, lengths, None, 0.5, True)
        error += (dx - g - ((g @ a).outer(d) + (g @ d).outer(a)) / 2).abs().max()
        sums = torch.stack([r @ x.T @ g + r @ g.T @ x for r in rows[3:, 0]]) * torch.tensor(
            [[1.0], [-1.0]], device=device
        )
        across = sums - rows[3:, 0] * (sums * rows[3:, 0]).sum(1, keepdim=True)
        error += (d_vectors[:, 0] - across / lengths[:, 0]).abs().max()
    if not error < 0.3:  # products may be rounded to ten bits, where the user allows TF32
        raise RuntimeError(f"they are off by {float(error):.1g}")


def _tile(b: int) -> tuple[int, int]:
    """Width and height of a tile, powers of two."""
    width = triton.next_power_of_2(b)
    return width, max(1, min(64, TILE // width))


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

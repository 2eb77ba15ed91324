"""Laws of the transforms, against dense matrices in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ether_diffusion.ether import transform as T
from support import dense

VARIANTS = ["ether", "ether_plus"]
BLOCKS = [1, 2, 3, 6]
FEATURES = 12


def vectors(variant: str, blocks: int, features: int = FEATURES, dtype: torch.dtype = torch.float64) -> Any:
    u = torch.randn(blocks, features // blocks, dtype=dtype, requires_grad=True)
    v = torch.randn(blocks, features // blocks, dtype=dtype, requires_grad=True)
    return (u, None) if variant == "ether" else (u, v)


def change(u: Any, v: Any) -> T.Reflection:
    return T.ether(u) if v is None else T.ether_plus(u, v)


def as_matrix(c: T.Reflection) -> torch.Tensor:
    n, _, b = c.left.shape
    return T.transform(c, torch.eye(n * b, dtype=c.left.dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_transform_is_the_papers_matrix(variant, blocks):
    u, v = vectors(variant, blocks)
    torch.testing.assert_close(as_matrix(change(u, v)), dense.matrix(u, v), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_transform_is_symmetric_and_block_diagonal(variant, blocks):
    h = as_matrix(change(*vectors(variant, blocks)))
    torch.testing.assert_close(h, h.T, rtol=0, atol=1e-14)
    inside = torch.block_diag(*torch.ones(blocks, FEATURES // blocks, FEATURES // blocks)).bool()
    assert (h[~inside] == 0).all()
    assert (h[inside] != 0).all()


@pytest.mark.parametrize("blocks", BLOCKS)
def test_ether_is_an_involution_of_determinant_minus_one_to_the_n(blocks):
    h = as_matrix(change(*vectors("ether", blocks)))
    torch.testing.assert_close(h @ h, torch.eye(FEATURES, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.linalg.det(h).item() == pytest.approx((-1) ** blocks, abs=1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_ether_is_always_2_sqrt_n_from_the_identity(blocks):
    c = change(*vectors("ether", blocks))
    assert torch.linalg.norm(as_matrix(c) - torch.eye(FEATURES)).item() == pytest.approx(
        2 * math.sqrt(blocks), abs=1e-12
    )
    assert T.distance(c).item() == pytest.approx(2 * math.sqrt(blocks), abs=1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_ether_plus_is_at_most_sqrt_2n_from_the_identity(blocks):
    for _ in range(50):
        c = change(*vectors("ether_plus", blocks))
        exact = torch.linalg.norm(as_matrix(c) - torch.eye(FEATURES)).item()
        assert T.distance(c).item() == pytest.approx(exact, abs=1e-12)
        assert exact <= math.sqrt(2 * blocks) + 1e-12


def test_ether_plus_reaches_its_bound_where_u_and_v_are_orthogonal():
    u, v = torch.eye(2, 6, dtype=torch.float64).unsqueeze(1)
    assert T.distance(T.ether_plus(u, v)).item() == pytest.approx(math.sqrt(2), abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_length_of_the_vectors_does_not_matter(variant):
    u, v = vectors(variant, 3)
    longer = change(1e6 * u, None if v is None else 1e-6 * v)
    torch.testing.assert_close(as_matrix(longer), as_matrix(change(u, v)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("sign", [1, -1])
def test_ether_plus_of_opposite_or_equal_vectors_is_exactly_the_identity(sign):
    u, _ = vectors("ether_plus", 3, dtype=torch.float32)
    x = torch.randn(5, FEATURES)
    assert torch.equal(T.transform(T.ether_plus(u, sign * u), x), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_vectors_stay_finite_with_finite_gradients(variant):
    u, v = vectors(variant, 2)
    raw = [w for w in (u, v) if w is not None]
    for w in raw:
        w.data.zero_()
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    y = T.transform(change(u, v), x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(w.grad.isfinite().all() for w in raw)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 12), -1), ((12,), 0), ((2, 3, 12), 2), ((2, 12, 3, 4), 1), ((12, 5), 0)]
)
def test_any_dimension_is_transformed(variant, blocks, shape, dim):
    u, v = vectors(variant, blocks)
    x = torch.randn(shape, dtype=torch.float64)
    expected = (x.movedim(dim, -1) @ dense.matrix(u, v).T).movedim(-1, dim)
    torch.testing.assert_close(T.transform(change(u, v), x, dim), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(T.apply_change(change(u, v), x, dim), expected - x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("shape", "dim"), [((3, 6), -1), ((2, 6, 2, 2), 1)])
@pytest.mark.parametrize("with_fixed", [False, True])
def test_first_and_second_derivatives_are_right(variant, blocks, shape, dim, with_fixed):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    fixed = torch.randn(6, dtype=torch.float64, requires_grad=True) if with_fixed else None
    u, v = vectors(variant, blocks, 6)
    inputs = tuple(t for t in (x, u, v, fixed) if t is not None)

    def f(*_):
        return T.transform(change(u, v), x, dim, scale=0.7, fixed=fixed)

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_derivatives_under_vmap_are_those_of_each_sample():
    u, v = vectors("ether_plus", 3)
    x = torch.randn(4, 5, FEATURES, dtype=torch.float64)

    def loss(u, v, x):
        return T.transform(T.ether_plus(u, v), x).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(u, v, x)
    for i in range(4):
        expected = torch.autograd.grad(loss(u, v, x[i]), (u, v))
        torch.testing.assert_close([g[i] for g in per_sample], list(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shape", "dim"), [((3, FEATURES), -1), ((2, FEATURES, 2, 2), 1)])
def test_with_or_without_gradients_the_bits_are_the_same(variant, shape, dim):
    torch.manual_seed(0)
    c, x, fixed = change(*vectors(variant, 2)), torch.randn(shape, dtype=torch.float64), torch.randn(FEATURES)
    with_gradients = T.transform(c, x, dim, 0.7, fixed)
    with torch.no_grad():
        assert torch.equal(T.transform(c, x, dim, 0.7, fixed), with_gradients)
    assert torch.equal(torch.func.vjp(lambda x: T.transform(c, x, dim, 0.7, fixed), x)[0], with_gradients)


def test_fixed_point_stays_where_it_is():
    u, v = vectors("ether_plus", 2)
    bias = torch.randn(FEATURES, dtype=torch.float64)
    torch.testing.assert_close(T.transform(change(u, v), bias, fixed=bias), bias, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_half_precision_input_is_kept_for_the_backward_pass(dtype):
    u, v = vectors("ether_plus", 1, 64, torch.float32)
    x = torch.randn(256, 64).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        T.transform(T.ether_plus(u, v), x)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert {t.data_ptr() for t in large} == {x.data_ptr()}


def test_memory_format_is_kept():
    x = torch.randn(2, 12, 5, 5).to(memory_format=torch.channels_last)
    y = T.transform(T.ether(torch.randn(2, 6)), x, dim=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_low_rank_factors_are_the_change_of_the_weight(variant, two_sided, blocks):
    u_in, v_in = vectors(variant, blocks, 12)
    u_out, v_out = vectors(variant, blocks, 8)
    w = torch.randn(8, 12, dtype=torch.float64)
    c_out = change(u_out, v_out) if two_sided else None
    B, A = T.low_rank(w, change(u_in, v_in), c_out)
    expected = dense.weight(w, dense.matrix(u_in, v_in), dense.matrix(u_out, v_out) if two_sided else None) - w
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-13)
    rank = blocks * (1 if variant == "ether" else 2) * (2 if two_sided else 1)
    assert (B.shape, A.shape) == ((8, rank), (rank, 12))


def test_forward_mode_is_refused_in_one_line():
    u, v = vectors("ether_plus", 1)
    x = torch.randn(3, FEATURES, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^[^\n]*jvp[^\n]*$"):
        torch.func.jvp(lambda x: T.transform(T.ether_plus(u, v), x), (x,), (torch.ones_like(x),))

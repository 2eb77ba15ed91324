"""ETHER's transforms and adapted layers as float64 matrices, straight from the paper's formulas: the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def matrix(u: Tensor, v: Tensor | None = None) -> Tensor:
    """blockdiag(H_1 ... H_n): `I - 2 u u^T`, or `I - u u^T + v v^T` where v is given, from raw u, v: (n, b)."""
    u = u.double()
    blocks = []
    for i in range(u.shape[0]):
        u_i = u[i] / u[i].norm()
        identity = torch.eye(len(u_i), dtype=torch.float64)
        if v is None:
            blocks.append(identity - 2 * torch.outer(u_i, u_i))
        else:
            v_i = v[i].double() / v[i].double().norm()
            blocks.append(identity - torch.outer(u_i, u_i) + torch.outer(v_i, v_i))
    return torch.block_diag(*blocks)


def weight(base: Tensor, h_in: Tensor, h_out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`W + s (H_out W H_in - W)` for W (out, in) or (out, in, kh, kw); convolutions are transformed over channels."""
    base = base.double()
    adapted = torch.einsum("oi...,ij->oj...", base, h_in)
    if h_out is not None:
        adapted = torch.einsum("po,oj...->pj...", h_out, adapted)
    return base + scale * (adapted - base)


def layer_output(base: nn.Module, x: Tensor, adapted: Tensor) -> Tensor:
    """Output of a Linear or Conv2d that had this float64 weight, its bias untouched."""
    assert isinstance(base, (nn.Linear, nn.Conv2d))
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return F.linear(x.double(), adapted, bias)
    assert not isinstance(base.padding, str)
    return F.conv2d(x.double(), adapted, bias, base.stride, base.padding, base.dilation)


def matrix_of(planes: Any) -> Tensor:
    """The matrix of one side of one adapter, read off its raw vectors. Differentiable with respect to them."""
    return matrix(planes.u, planes.v)

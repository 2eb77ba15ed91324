"""Layers under Naive and magnitude adapters, and the float64 weights that these stand for: the oracle."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.tuners import MagnitudeConfig, MagnitudeLayer, NaiveConfig, NaiveLayer

# The kinds of base layer that are adapted: name -> layer of 12 -> 8 features.
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "conv 1x1": lambda: nn.Conv2d(12, 8, 1),
    "conv 3x3 strided, padded, dilated": lambda: nn.Conv2d(12, 8, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
}
METHODS: dict[str, tuple[Any, Any]] = {
    "naive": (NaiveConfig, NaiveLayer),
    "magnitude": (MagnitudeConfig, MagnitudeLayer),
}
ATTRIBUTES = {"naive": "naive_blocks", "magnitude": "magnitude_rows"}


def config(method: str, **settings: Any) -> Any:
    """`init_weights=False` unless said otherwise, so that the adapter does something."""
    return METHODS[method][0](**{"init_weights": False, **settings})


def wrap(method: str, base: nn.Module, name: str = "default", **settings: Any) -> Any:
    base.requires_grad_(False)
    return METHODS[method][1](base, name, config(method, **settings), "layer")


def trained(layer: Any, name: str = "default") -> nn.Parameter:
    """What the adapter trains: blocks less the identity (n, b, b), or scales less one (out,)."""
    return getattr(layer, layer.adapter_layer_names[0])[name].change


def random_input(base: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((2, 12, 7, 6) if isinstance(base, nn.Conv2d) else (2, 5, 12), dtype=dtype)


def dense_weight(layer: Any, weight: Tensor, name: str = "default", scale: float = 1.0) -> Tensor:
    """`W + s (W' - W)`, with W' = W R^T or diag(s) W as dense products in float64."""
    change, weight = trained(layer, name).double(), weight.double()
    if change.ndim == 1:
        adapted = torch.einsum("po,oi...->pi...", torch.diag(1 + change), weight)
    else:
        rotation = torch.block_diag(*(torch.eye(len(block), dtype=torch.float64) + block for block in change))
        adapted = torch.einsum("oi...,ji->oj...", weight, rotation)
    return weight + scale * (adapted - weight)


def dense_output(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Output of a Linear or Conv2d that had this float64 weight, its bias untouched."""
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, base.stride, base.padding, base.dilation)

"""Single layers with Naive and magnitude adapters, and the float64 weights they stand for: the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.tuners import MagnitudeConfig, MagnitudeLayer, NaiveConfig, NaiveLayer

METHODS: dict[str, tuple[Any, Any]] = {
    "naive": (NaiveConfig, NaiveLayer),
    "magnitude": (MagnitudeConfig, MagnitudeLayer),
}
ATTRIBUTES = {"naive": "naive_blocks", "magnitude": "magnitude_rows"}


def config(method: str, **settings: Any) -> Any:
    """`init_weights=False` unless stated otherwise, so that the adapter changes the output."""
    return METHODS[method][0](**{"init_weights": False, **settings})


def wrap(method: str, base: nn.Module, name: str = "default", **settings: Any) -> Any:
    base.requires_grad_(False)
    return METHODS[method][1](base, name, config(method, **settings), "layer")


def trained(layer: Any, name: str = "default") -> nn.Parameter:
    """What the adapter trains: blocks less the identity (n, b, b), or scales less one (out,)."""
    return getattr(layer, layer.adapter_layer_names[0])[name].change


def dense_weight(layer: Any, weight: Tensor, name: str = "default", scale: float = 1.0) -> Tensor:
    """`W + s (W' - W)`, with W' = W R^T or diag(s) W as dense products in float64."""
    change, weight = trained(layer, name).double(), weight.double()
    if change.ndim == 1:
        adapted = torch.einsum("po,oi...->pi...", torch.diag(1 + change), weight)
    else:
        rotation = torch.block_diag(*(torch.eye(len(block), dtype=torch.float64) + block for block in change))
        adapted = torch.einsum("oi...,ji->oj...", weight, rotation)
    return weight + scale * (adapted - weight)

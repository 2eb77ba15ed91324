"""Layers and models that the tests of the tuner share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.ether.layer import EtherConv2d, EtherLinear

# The kinds of base layer that are adapted: name -> layer of 12 -> 8 features.
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "conv 1x1": lambda: nn.Conv2d(12, 8, 1),
    "conv 3x3 without bias": lambda: nn.Conv2d(12, 8, 3, padding=1, bias=False),
    "conv 3x3 strided, padded, dilated": lambda: nn.Conv2d(12, 8, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
}
VARIANTS = [("ether", "in"), ("ether", "both"), ("ether_plus", "in"), ("ether_plus", "both")]


def wrap(base: nn.Module, name: str = "default", **settings: Any) -> Any:
    """One adapted layer; `init_weights=False` unless said otherwise, so that the adapter does something."""
    config = EtherConfig(**{"init_weights": False, **settings})
    wrapper = EtherConv2d if isinstance(base, nn.Conv2d) else EtherLinear
    base.requires_grad_(False)
    return wrapper(base, name, config, "layer")


def random_input(base: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, 12, 7, 6) if isinstance(base, nn.Conv2d) else (2, 5, 12)
    return torch.randn(shape, dtype=dtype)


class Mlp(nn.Module):
    """Two linear layers, lin0: 16 -> 24 and lin1: 24 -> 16, and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(16, 24, bias=bias)
        self.lin1 = nn.Linear(24, 16, bias=bias)
        self.head = nn.Linear(16, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(torch.nn.functional.silu(self.lin0(x))))

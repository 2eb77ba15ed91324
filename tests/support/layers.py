"""Plain layers and models of a few features, for tests of the tuners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "conv 1x1": lambda: nn.Conv2d(12, 8, 1),
    "conv 3x3 without bias": lambda: nn.Conv2d(12, 8, 3, padding=1, bias=False),
    "conv 3x3 strided, padded, dilated": lambda: nn.Conv2d(12, 8, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
}
"""The kinds of base layer that can be adapted: name -> a function that makes a layer of 12 -> 8 features."""


def random_input(base: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 5, 12) for a linear layer, (2, 12, 7, 6) for a convolution."""
    return torch.randn((2, 12, 7, 6) if isinstance(base, nn.Conv2d) else (2, 5, 12), dtype=dtype)


class Mlp(nn.Module):
    """Two linear layers, lin0: 16 -> 24 and lin1: 24 -> 16, and a head of 4 outputs."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(16, 24, bias=bias)
        self.lin1 = nn.Linear(24, 16, bias=bias)
        self.head = nn.Linear(16, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(nn.functional.silu(self.lin0(x))))

"""What identifies a scorer's weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ether_diffusion.metrics.weights import digest


def network(*names: str, bias: float = 0.0) -> Any:
    """Two layers and a batch norm, of these names."""
    layers = nn.Linear(3, 2), nn.Linear(2, 3), nn.BatchNorm1d(3)
    with torch.no_grad():
        for layer in layers[:2]:
            layer.weight.copy_(torch.arange(6.0).view_as(layer.weight))
            layer.bias.fill_(bias)
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


def test_a_digest_is_that_of_the_values_whatever_a_library_calls_its_modules() -> None:
    one = network("patches", "head", "norm")
    modules: Any = reversed(list(network("embeddings", "classifier", "bn").named_children()))
    other: Any = nn.ModuleDict(modules)
    assert digest(one) == digest(other)
    other["bn"].num_batches_tracked.fill_(7)  # which a frozen network does not read
    assert digest(one) == digest(other)
    assert digest(one) == digest(network("a", "b", "c").to(torch.float64))
    assert digest(one) != digest(network("patches", "head", "norm", bias=1e-6))
    transposed = network("patches", "head", "norm")
    transposed.patches.weight = nn.Parameter(transposed.patches.weight.reshape(2, 3).T.contiguous())  # other shapes
    assert digest(one) != digest(transposed)

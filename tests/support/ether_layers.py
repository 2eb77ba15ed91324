"""Single layers with ETHER and ETHER+ adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.ether import EtherLayer

VARIANTS = [("ether", "in"), ("ether", "both"), ("ether_plus", "in"), ("ether_plus", "both")]
"""Every pair of `variant` and `sides`."""


def wrap(base: nn.Module, name: str = "default", **settings: Any) -> Any:
    """One adapted layer; `init_weights=False` unless stated otherwise, so that the adapter changes the output."""
    config = EtherConfig(**{"init_weights": False, **settings})
    base.requires_grad_(False)
    return EtherLayer(base, name, config, "layer")

"""The miniature, read from its files once a process: whoever loads it afterwards gets a deep copy."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ether_diffusion.models import bases
from ether_diffusion.tinyworld import WEIGHTS


def read_tiny_once() -> None:
    """Change what `load_base("tiny")` reads, for the rest of the process."""
    real, kept = bases._from_pretrained, list[Any]()

    def from_pretrained(name: str, *options: Any) -> Any:
        if name != str(WEIGHTS / "pipeline"):
            return real(name, *options)
        if not kept:
            with torch.random.fork_rng(devices=[]):
                kept.append(real(name, torch.float32, torch.float32, None))
        return copy.deepcopy(kept[0])

    bases._from_pretrained = from_pretrained

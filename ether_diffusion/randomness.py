"""Random numbers as a function of (seed, stream name, sample index), and of nothing else.

The number of processes, batch shapes, workers and restarts cannot change what a sample draws.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed for one draw: the same for the same arguments on every machine, unrelated for any other."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one draw. Draw on the CPU and move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


def permutation(seed: int, stream: str, epoch: int, size: int) -> list[int]:
    """The order of `size` samples in an epoch."""
    return torch.randperm(size, generator=generator(seed, f"{stream}/order", epoch)).tolist()

"""Random numbers as a function of (seed, stream name, sample index), and of nothing else.

The number of processes, batch shapes, workers and restarts do not change a sample's random numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .files import Digest


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed: the same for the same arguments on every machine, unrelated for any others."""
    digest = Digest(8).update(f"{seed}/{stream}/{index}").bytes()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator. Sample on the CPU and move the result, so that every device has the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


def seed_all(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, of the CPU and of this device."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":  # on the CPU alone this call takes a millisecond, to note for which GPUs it would be
        torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global generators at a seed, and restore their states afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed a GPU that is used later
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def permutation(seed: int, stream: str, epoch: int, size: int) -> list[int]:
    """The order of `size` samples in an epoch."""
    return torch.randperm(size, generator=generator(seed, f"{stream}/order", epoch)).tolist()

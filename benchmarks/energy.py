"""Time and memory of hyperspherical energy on a random UNet of Stable Diffusion v1.5's shape, with one thread.

python benchmarks/energy.py
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import UNet2DConditionModel

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import detach, inject
from ether_diffusion.adapters.targets import target_modules
from ether_diffusion.analysis.changes import layer_changes
from ether_diffusion.analysis.energy import BaseEnergies, model_energy
from ether_diffusion.models.families.stable_diffusion_v1 import UNET
from ether_diffusion.randomness import seeded

T = TypeVar("T")


def timed(what: str, work: Callable[[], T]) -> T:
    """Do the work; print its CPU time and the process's peak resident memory so far."""
    start = time.process_time()
    result = work()
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"{what:<52} {time.process_time() - start:6.1f} s   peak {peak:.2f} GiB", flush=True)
    return result


def main() -> None:
    """Measure attention layers with random two-sided ETHER+, near its largest distance; then the whole UNet."""
    torch.set_num_threads(1)
    with seeded(0):
        unet = timed("make the UNet", lambda: UNet2DConditionModel(**UNET).requires_grad_(False))
        config = EtherConfig(target_modules=target_modules("attention"), init_weights=False)
        inject(unet, config, "default")
    rows = timed("attention layers, with and without ETHER+", lambda: list(BaseEnergies().changes(layer_changes(unet))))
    change = sum(row.mean_change for row in rows)
    print(f"  change over {len(rows)} layers: sum {change:.5f}, mean {change / len(rows):.7f}")
    detach(unet)
    energy = timed("all linear layers and convolutions", lambda: model_energy(unet))
    print(f"  energy: {energy:.3f}")


if __name__ == "__main__":
    main()

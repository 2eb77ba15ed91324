"""What certificates cost a short training: seconds of the quickstart's first steps that are spent on them.

    python benchmarks/certificate_cost.py [STEPS]

The run has a checkpoint every ten steps and no validation images: both make the share larger than in a real run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from ether_diffusion.adapters import saving
from ether_diffusion.adapters.certify import Watch
from ether_diffusion.config import load_config
from ether_diffusion.training import dreambooth, run_task, training_base

PLACES: list[tuple[Any, str]] = [
    (training_base, "record_base_digest"),
    (run_task, "check_start"),
    (Watch, "__init__"),
    (Watch, "observe"),
    (Watch, "state"),
    (saving, "_certificate"),
]
"""Where functions and methods of the certificate are called."""


def main() -> None:
    """Print a line for each part, and the share of all."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    seconds = defaultdict(float)
    for owner, name in PLACES:
        setattr(owner, name, timed(getattr(owner, name), seconds))
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}/run", f"training.steps={steps}", "training.checkpoint_every=10"]
        settings += ["validation.prompts=[]", "training.tracker=none"]
        began = time.perf_counter()
        dreambooth.run(load_config(dreambooth.DreamBoothConfig, "quickstart/dreambooth", settings))
        elapsed = time.perf_counter() - began
    for name, value in seconds.items():
        print(f"{name:<20} {value:8.3f} s")
    spent = sum(seconds.values())
    print(f"all {spent:.2f} s of {elapsed:.1f} s: {spent / elapsed:.1%}")


def timed(function: Any, seconds: dict[str, float]) -> Any:
    """The function, whose time is added up under its name."""

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[function.__name__] += time.perf_counter() - began

    return call


if __name__ == "__main__":
    main()

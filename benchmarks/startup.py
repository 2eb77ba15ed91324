"""Seconds until a command answers, until the package is imported, and until the quickstart's first training step.

    python benchmarks/startup.py [--rounds 3] [--write]

Each command runs in a process of its own, in rounds; the table has medians. CPU seconds are those of the process and
its children, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = [
    "train_dreambooth.py",
    "--config",
    "configs/quickstart/dreambooth.yaml",
    "training.steps=1",
    "training.warmup_steps=0",
    "validation.prompts=[]",
]
COMMANDS = {
    "ether-diffusion --help": ["-m", "ether_diffusion_cli", "--help"],
    "train_dreambooth.py --help": ["train_dreambooth.py", "--help"],
    "import ether_diffusion": ["-c", "import ether_diffusion"],
    "import torch": ["-c", "import torch"],
    "import torch, diffusers, peft": ["-c", "import torch, diffusers, peft; diffusers.StableDiffusionPipeline"],
    "quickstart, one step": QUICKSTART,
    "the same by accelerate launch": [
        *("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"),
        *("--num_cpu_threads_per_process", "2", *QUICKSTART),
    ],
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    arguments = parser.parse_args()
    from performance_page import command, publish

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.commands}
    for _ in range(arguments.rounds):
        for name in arguments.commands:
            seconds[name].append(once(COMMANDS[name]))
    lines = [f"`{command()}`\n", "| command | seconds | CPU seconds |", "|---|---|---|"]
    for name, found in seconds.items():
        wall, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        lines.append(f"| `{name}` | {wall:.2f} | {cpu:.2f} |")
    publish("startup", "\n".join(lines), arguments.write)


def once(arguments: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one Python process."""
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"output_dir={folder}/run"] if "--config" in arguments else []
        before, began = os.times(), time.perf_counter()
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        subprocess.run([sys.executable, *arguments, *extra], check=True, capture_output=True, cwd=ROOT, env=environment)
        wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


if __name__ == "__main__":
    main()

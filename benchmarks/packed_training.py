"""Steps of N trainings in shared passes (`train --many`), against the same N trainings one after another.

    python benchmarks/packed_training.py --write               # `tiny`: minutes
    python benchmarks/packed_training.py --base /path/to/sd15-random --runs 1 8 --batches 1 --resolution 64 --rounds 3

A step is all that a training does in it: photos, latents, passes, the optimiser, metrics; no checkpoints and
no images. CPU seconds of this process on one thread, which other work on the machine hardly changes; a training alone
and the packs take turns, and a number is the median over the rounds of the ratio within a round. ETHER+ on the
attention (`--target quickstart`: on the quickstart's layers, convolutions among them), data cached
(`data.cache=true`). `benchmarks/full_size_base.py` writes Stable Diffusion v1.5's architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from performance_page import command, publish

BARS = {8: 2.5, 30: 4.0}
"""Least speed-up on `tiny` at batch 1, by the number of runs."""
FIRST_STEPS = 17
"""In most of which gradients are looked at for the certificate, as in few later ones."""


def main() -> None:
    """Measure, print the table, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="tiny, or a folder in diffusers' layout")
    parser.add_argument("--method", default="ether_plus", choices=("ether", "ether_plus"))
    parser.add_argument("--target", default="attention", choices=("attention", "quickstart"))
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 8, 30, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| batch | runs at once | CPU seconds a run's step | alone | faster | trained a minute, of 300 steps |"]
    lines.append("|---|---|---|---|---|---|")
    notes = []
    for batch in arguments.batches:
        for number in arguments.runs:
            together, alone, ratio = measure(number, batch, arguments)
            lines.append(
                f"| {batch} | {number} | {together:.3f} | {alone:.3f} | {ratio:.2f} x | {60 / (300 * together):.2f} |"
            )
            print(lines[-1], flush=True)
            if arguments.base == "tiny" and arguments.target == "attention" and batch == 1 and number in BARS:
                notes.append(f"{number} runs at batch 1: {ratio:.2f} x (bar: {BARS[number]}).")
    layers = "attention" if arguments.target == "attention" else "the quickstart's layers"
    where = f"{arguments.base}, {arguments.method} on {layers}, {arguments.resolution} pixels, fp32, one thread"
    name = "tiny" if arguments.base == "tiny" else "sd15"
    publish(f"packed_training_{name}", "\n".join([f"`{command()}`: {where}", "", *lines, "", *notes]), arguments.write)


def measure(number: int, batch: int, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """CPU seconds of a step of one of `number` runs, packed and alone, and the ratio."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        packed = rounds(Path(folder) / "packed", number, batch, arguments)
        alone = rounds(Path(folder) / "alone", 0, batch, arguments)
        for _ in range(FIRST_STEPS):
            next(packed)
            next(alone)
        found = [
            (next(packed) / number, statistics.mean(next(alone) for _ in range(3)))  # which take about as long
            for _ in range(arguments.rounds)
        ]
        packed.close()
        alone.close()
    together, solo = (statistics.median(part) for part in zip(*found, strict=True))
    return together, solo, statistics.median(own / shared for shared, own in found)


def rounds(folder: Path, number: int, batch: int, arguments: argparse.Namespace) -> Generator[float, None, None]:
    """Take steps, and yield the CPU seconds of each: of `number` packed runs, or of one alone if that is 0."""
    from ether_diffusion.training.environment import StopRequest, start_accelerator
    from ether_diffusion.training.many_runs import Run, build_trainers, make_pack
    from ether_diffusion.training.run_folder import RunFolder
    from ether_diffusion.training.training_base import load_training_base

    configs = [config_of(folder / str(k), k, batch, arguments) for k in range(max(1, number))]
    accelerator = start_accelerator(configs[0].training, folder, dry_run=False)
    base = load_training_base(configs[0], accelerator)
    runs = []
    for k, config in enumerate(configs, 1):
        place = RunFolder(config.output_dir)
        place.path.mkdir(parents=True)
        runs.append(Run(k, config, place, task_of(config), accelerator))
    trainers = build_trainers(runs, base, accelerator)
    pack: Any = make_pack(trainers, base, accelerator) if number else Alone(trainers[0])
    steps = [trainer.steps(StopRequest()) for trainer in trainers]
    waiting: dict[int, Any] = {k: step.send(None) for k, step in enumerate(steps)}
    while True:
        began = time.process_time()
        waiting = {k: steps[k].send(0) for k in waiting}
        waiting = {k: steps[k].send(losses) for k, losses in pack.gradients(waiting).items()}
        yield time.process_time() - began


class Alone:
    """The gradients of one run, as in a training of its own."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def gradients(self, batches: dict[int, Any]) -> dict[int, Any]:
        return {0: self.trainer.processes.gradients(batches[0], 1, last=True)}


def config_of(folder: Path, seed: int, batch: int, arguments: argparse.Namespace) -> Any:
    from ether_diffusion.config import load_config
    from ether_diffusion.training.dreambooth_config import DreamBoothConfig, resolve

    overrides = [
        f"base_model={arguments.base}",
        f"output_dir={folder}",
        f"seed={seed}",
        f"adapter.method={arguments.method}",
        *([] if arguments.target == "quickstart" else [f"adapter.target={arguments.target}"]),
        "data.instance_dir=builtin:robot",
        f"data.resolution={arguments.resolution}",
        "data.crop=center",
        "data.cache=true",
        f"data.cache_dir={folder.parent / 'cache'}",
        "data.prior=null",
        f"training.batch_size={batch}",
        "training.steps=200",
        "training.checkpoint_every=200",
        "training.tracker=none",
        "training.ema_decay=null",
        "validation.prompts=[]",
    ]
    return resolve(load_config(DreamBoothConfig, "quickstart/dreambooth", overrides))


def task_of(config: Any) -> Any:
    from ether_diffusion.training.dreambooth import DreamBoothTask

    return DreamBoothTask(config, None, resumed=False)


if __name__ == "__main__":
    main()

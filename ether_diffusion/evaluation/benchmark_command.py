"""`ether-diffusion benchmark`, and `eval/benchmark.py`: runs what was asked for, and tells what came of it."""

from __future__ import annotations

from argparse import Namespace

from ether_diffusion.config import load_config
from ether_diffusion.training.environment import Interrupted
from ether_diffusion.training.loop import TrainingFailed

from .benchmark import Outcome, progress, run_benchmark
from .benchmark_config import BenchmarkConfig, Shard
from .benchmark_ray import RayExecutor


def run_benchmark_command(arguments: Namespace) -> None:
    """Run a benchmark and print its tables.

    Raises:
        UserError, Interrupted: as `run_benchmark`.
        TrainingFailed: some trainings failed; the others are done.
    """
    config = load_config(BenchmarkConfig, arguments.config, arguments.overrides)
    if arguments.status:
        print(progress(config))
        return
    executor = None
    if arguments.executor == "ray":
        executor = RayExecutor(arguments.ray_address, arguments.workers, arguments.retries)
    try:
        outcome = run_benchmark(config, Shard(*arguments.shard), executor)
    except Interrupted as error:
        stopped = str(error).split(", saved.")[0]
        raise Interrupted(error.signum, f"{stopped}, saved. The same command goes on.") from None
    _tell(outcome)
    if outcome.failed:
        raise TrainingFailed("\n".join(f"{unit}: {reason}" for unit, reason in outcome.failed.items()))


def _tell(outcome: Outcome) -> None:
    for table in outcome.tables.values():
        print(f"\n{table}")
    for file in outcome.files:
        print(file)
    if outcome.waiting:
        print(f"Not done: {len(outcome.waiting)} units, the first of them {outcome.waiting[0]}. --status tells more.")

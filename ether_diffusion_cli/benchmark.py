"""`ether-diffusion benchmark` and `grid`, `eval/benchmark.py` and `eval/grid.py`: run, and tell what came of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ether_diffusion.analysis.output import command_line
from ether_diffusion.benchmark.config import BenchmarkConfig, Shard, Unit
from ether_diffusion.benchmark.grid import divergence, run_grid
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.benchmark.ray_executor import RayExecutor
from ether_diffusion.benchmark.runner import progress, run_benchmark
from ether_diffusion.config import load_config
from ether_diffusion.errors import Interrupted, TrainingFailed


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
    with _resuming():
        outcome = run_benchmark(config, Shard(*arguments.shard), _executor(arguments))
    _tell(outcome.tables.values(), outcome.files, outcome.waiting)
    _fail(outcome.failed)


def run_grid_command(arguments: Namespace) -> None:
    """Run a grid and print its tables. A training that diverged is a finding, not a failure.

    Raises:
        UserError, Interrupted: as `run_grid`.
        TrainingFailed: some trainings failed for another reason; the others are done.
    """
    config = load_config(GridConfig, arguments.config, arguments.overrides)
    if arguments.status:
        print(progress(config.benchmark()))
        return
    command = command_line("eval/grid.py", ["--config", arguments.config, *arguments.overrides])
    with _resuming():
        outcome, files = run_grid(config, command, Shard(*arguments.shard), _executor(arguments))
    diverged = {unit: reason for unit in outcome.waiting if (reason := divergence(config, unit))}
    for unit, reason in diverged.items():
        print(f"{unit}: {reason}")
    tables = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".md"]
    _tell(tables, files, [unit for unit in outcome.waiting if unit not in diverged])
    _fail({unit: reason for unit, reason in outcome.failed.items() if unit not in diverged})


@contextmanager
def _resuming() -> Iterator[None]:
    try:
        yield
    except Interrupted as error:
        stopped = str(error).split(", saved.")[0]
        raise Interrupted(error.signum, f"{stopped}, saved. The same command goes on.") from None


def _executor(arguments: Namespace) -> RayExecutor | None:
    if arguments.executor == "ray":
        return RayExecutor(arguments.ray_address, arguments.workers, arguments.retries)
    return None


def _tell(tables: Iterable[str], files: Iterable[Path], waiting: Sequence[Unit]) -> None:
    for table in tables:
        print(f"\n{table}")
    for file in files:
        print(file)
    if waiting:
        print(f"Not done: {len(waiting)} units, the first of them {waiting[0]}. --status tells more.")


def _fail(failed: Mapping[Unit, str]) -> None:
    if failed:
        raise TrainingFailed("\n".join(f"{unit}: {reason}" for unit, reason in failed.items()))

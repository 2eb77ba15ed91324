"""`ether-diffusion benchmark`: methods are trained and scored on subjects or maps; `grid`: at many settings."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, add_config, config_file, positive, shard

if TYPE_CHECKING:
    from ether_diffusion.benchmark.config import Unit
    from ether_diffusion.benchmark.executors import Executor


def add_parser(commands: Commands) -> None:
    for name, run, example, summary, description in (
        (
            "benchmark",
            run_benchmark,
            "benchmark/tinyworld",
            "train, generate and score methods on subjects or maps: a table",
            "Train, generate and score every method on every subject; then put the methods into a table. The same "
            "command resumes what was interrupted. Any number of workers gives the same numbers.",
        ),
        (
            "grid",
            run_grid,
            "benchmark/rates_tinyworld",
            "a benchmark over learning rates, blocks or other settings, and seeds: tables and plots",
            "Train, generate and score methods at every point of a grid, with several seeds; then write tables and "
            "plots. As `benchmark`, it resumes what was interrupted and can be shared among machines.",
        ),
    ):
        parser = commands.add(name, run, summary, description)
        add_config(parser, example, "output_dir=runs/mine")
        add = parser.add_argument
        workers = "units at a time (default: local 1; ray one a GPU, or one a core)"
        add("--shard", type=shard, default=(1, 1), metavar="I/N", help="do the I-th of N shares, as in a SLURM array")
        add("--executor", choices=("local", "ray"), default="local", help="processes of this machine (default), or Ray")
        add("--ray-address", metavar="ADDRESS", help="of a cluster; auto: this machine's (default: this machine alone)")
        add("--workers", type=positive, metavar="N", help=workers)
        add("--retries", type=positive, default=3, metavar="N", help="for a unit whose workers die (default: 3)")
        add("--status", action="store_true", help="print how much is done, and exit")


def run_benchmark(arguments: Namespace) -> None:
    """Run a benchmark and print its tables.

    Raises:
        UserError, Interrupted: as `benchmark.runner.run_benchmark`.
        TrainingFailed: some trainings failed; the others are done.
    """
    from ether_diffusion.benchmark import runner
    from ether_diffusion.benchmark.config import BenchmarkConfig
    from ether_diffusion.config import load_config

    config = load_config(BenchmarkConfig, config_file(arguments), arguments.overrides)
    if arguments.status:
        print(runner.progress(config))
        return
    with _same_command_resumes():
        outcome = runner.run_benchmark(config, _executor_of(arguments))
    _print_outcome(outcome.tables.values(), outcome.files, outcome.waiting)
    _fail(outcome.failed)


def run_grid(arguments: Namespace) -> None:
    """Run a grid and print its tables. A training that diverged is a finding, not a failure.

    Raises:
        UserError, Interrupted: as `grid_report.run_grid`.
        TrainingFailed: some trainings failed for another reason; the others are done.
    """
    from ether_diffusion.benchmark import grid_report, runner
    from ether_diffusion.benchmark.grid import divergence
    from ether_diffusion.benchmark.grid_config import GridConfig
    from ether_diffusion.config import load_config

    config = load_config(GridConfig, config_file(arguments), arguments.overrides)
    if arguments.status:
        print(runner.progress(config.benchmark()))
        return
    # Without shards and workers: whoever writes the tables last, they are the same.
    command = shlex.join([*arguments.program, "--config", arguments.config, *arguments.overrides])
    with _same_command_resumes():
        outcome, files = grid_report.run_grid(config, command, _executor_of(arguments))
    diverged = {unit: reason for unit in outcome.waiting if (reason := divergence(config, unit))}
    for unit, reason in diverged.items():
        print(f"{unit}: {reason}")
    _print_outcome(outcome.tables.values(), files, [unit for unit in outcome.waiting if unit not in diverged])
    _fail({unit: reason for unit, reason in outcome.failed.items() if unit not in diverged})


@contextmanager
def _same_command_resumes() -> Iterator[None]:
    """Say after an interruption that the same command resumes, where a training would name one of its own."""
    from ether_diffusion.errors import Interrupted

    try:
        yield
    except Interrupted as error:
        stopped = str(error).split(". ")[0].rstrip(".")
        raise Interrupted(error.signum, f"{stopped}. The same command resumes.") from None


def _executor_of(arguments: Namespace) -> Executor:
    """This command's share of the units, done by Ray, by a pool of processes, or in this process."""
    from ether_diffusion.benchmark.executors import InProcess, Shard
    from ether_diffusion.benchmark.local_pool import LocalPool
    from ether_diffusion.benchmark.ray_executor import RayExecutor

    executor: Executor
    if arguments.executor == "ray":
        executor = RayExecutor(arguments.ray_address, arguments.workers, arguments.retries)
    else:
        executor = LocalPool(arguments.workers, arguments.retries) if (arguments.workers or 1) > 1 else InProcess()
    number, count = arguments.shard
    return Shard(number, count, executor)


def _print_outcome(tables: Iterable[str], files: Iterable[Path], waiting: Sequence[Unit]) -> None:
    """Print tables, files, and how much is not done."""
    for table in tables:
        print(f"\n{table}")
    for file in files:
        print(file)
    if waiting:
        print(f"Not done: {len(waiting)} units; the first is {waiting[0]}. --status shows more.")


def _fail(failed: Mapping[Unit, str]) -> None:
    """Raise TrainingFailed if a unit failed."""
    from ether_diffusion.errors import TrainingFailed

    if failed:
        raise TrainingFailed("\n".join(f"{unit}: {reason}" for unit, reason in failed.items()))

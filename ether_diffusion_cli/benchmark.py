"""`ether-diffusion benchmark`: train, generate and score methods on subjects or maps; then a table over the methods."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, add_command, add_config, positive, shard

if TYPE_CHECKING:
    from ether_diffusion.benchmark.config import Unit
    from ether_diffusion.benchmark.executors import Executor


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "benchmark",
        run,
        summary="train, generate and score methods on subjects or maps: a table",
        description="Train, generate and score every method on every subject; then put the methods into a table. The "
        "same command resumes what was interrupted. Any number of workers gives the same numbers.",
        prog=prog,
    )
    add_config(parser, "benchmark/tinyworld", "output_dir=runs/mine")
    add_worker_options(parser)


def add_worker_options(parser: ArgumentParser) -> None:
    """Which part of the work is done here, by how many workers; or only how far it is."""
    add = parser.add_argument
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="do the I-th of N shares, as in a SLURM array")
    add("--executor", choices=("local", "ray"), default="local", help="processes of this machine (default), or Ray")
    add("--ray-address", metavar="ADDRESS", help="of a cluster; auto: this machine's (default: this machine alone)")
    add(
        "--workers", type=positive, metavar="N", help="units at a time (default: local 1; ray one a GPU, or one a core)"
    )
    add("--retries", type=positive, default=3, metavar="N", help="for a unit whose Ray workers die (default: 3)")
    add("--status", action="store_true", help="print how much is done, and exit")


def run(arguments: Namespace) -> None:
    """Run a benchmark and print its tables.

    Raises:
        UserError, Interrupted: as `run_benchmark`.
        TrainingFailed: some trainings failed; the others are done.
    """
    from ether_diffusion.benchmark.config import BenchmarkConfig
    from ether_diffusion.benchmark.runner import progress, run_benchmark
    from ether_diffusion.config import load_config

    config = load_config(BenchmarkConfig, arguments.config, arguments.overrides)
    if arguments.status:
        print(progress(config))
        return
    with same_command_resumes():
        outcome = run_benchmark(config, executor_of(arguments))
    print_outcome(outcome.tables.values(), outcome.files, outcome.waiting)
    fail(outcome.failed)


@contextmanager
def same_command_resumes() -> Iterator[None]:
    """Say after an interruption that the same command resumes, where a training would name one of its own."""
    from ether_diffusion.errors import Interrupted

    try:
        yield
    except Interrupted as error:
        stopped = str(error).split(", saved.")[0]
        raise Interrupted(error.signum, f"{stopped}, saved. The same command resumes.") from None


def executor_of(arguments: Namespace) -> Executor:
    """This command's share of the units, done by Ray, by a pool of processes, or in this process."""
    from ether_diffusion.benchmark.executors import InProcess, Shard
    from ether_diffusion.benchmark.local_pool import LocalPool
    from ether_diffusion.benchmark.ray_executor import RayExecutor

    executor: Executor
    if arguments.executor == "ray":
        executor = RayExecutor(arguments.ray_address, arguments.workers, arguments.retries)
    else:
        executor = LocalPool(arguments.workers) if (arguments.workers or 1) > 1 else InProcess()
    number, count = arguments.shard
    return Shard(number, count, executor)


def print_outcome(tables: Iterable[str], files: Iterable[Path], waiting: Sequence[Unit]) -> None:
    """Print tables, files, and how much is not done."""
    for table in tables:
        print(f"\n{table}")
    for file in files:
        print(file)
    if waiting:
        print(f"Not done: {len(waiting)} units; the first is {waiting[0]}. --status shows more.")


def fail(failed: Mapping[Unit, str]) -> None:
    """Raise TrainingFailed if a unit failed."""
    from ether_diffusion.errors import TrainingFailed

    if failed:
        raise TrainingFailed("\n".join(f"{unit}: {reason}" for unit, reason in failed.items()))

"""`ether-diffusion grid`: a benchmark at every point of a grid of settings, with several seeds."""

from __future__ import annotations

import shlex
from argparse import Namespace

from .arguments import Commands, add_command, add_config
from .benchmark import add_worker_options, executor_of, fail, print_outcome, same_command_resumes


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "grid",
        run,
        summary="a benchmark over learning rates, blocks or other settings, and seeds: tables and plots",
        description="Train, generate and score methods at every point of a grid, with several seeds; then write tables "
        "and plots. As `benchmark`, it resumes what was interrupted and can be shared among machines.",
        prog=prog,
    )
    add_config(parser, "benchmark/rates_tinyworld", "output_dir=runs/mine")
    add_worker_options(parser)


def run(arguments: Namespace) -> None:
    """Run a grid and print its tables. A training that diverged is a finding, not a failure.

    Raises:
        UserError, Interrupted: as `run_grid`.
        TrainingFailed: some trainings failed for another reason; the others are done.
    """
    from ether_diffusion.benchmark.grid import divergence
    from ether_diffusion.benchmark.grid_config import GridConfig
    from ether_diffusion.benchmark.grid_runner import run_grid
    from ether_diffusion.benchmark.runner import progress
    from ether_diffusion.config import load_config

    config = load_config(GridConfig, arguments.config, arguments.overrides)
    if arguments.status:
        print(progress(config.benchmark()))
        return
    # Without shards and workers: whoever writes the tables last, they are the same.
    command = shlex.join([*arguments.program, "--config", arguments.config, *arguments.overrides])
    with same_command_resumes():
        outcome, files = run_grid(config, command, executor_of(arguments))
    diverged = {unit: reason for unit in outcome.waiting if (reason := divergence(config, unit))}
    for unit, reason in diverged.items():
        print(f"{unit}: {reason}")
    tables = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".md"]
    print_outcome(tables, files, [unit for unit in outcome.waiting if unit not in diverged])
    fail({unit: reason for unit, reason in outcome.failed.items() if unit not in diverged})

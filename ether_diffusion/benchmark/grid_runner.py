"""A benchmark along a grid: learning rates (paper, Fig. 5, 6), blocks (Table 9), sides (Table 11), or any settings."""

from __future__ import annotations

from pathlib import Path

from ether_diffusion.analysis.output import check_matplotlib, write_command
from ether_diffusion.config import to_yaml
from ether_diffusion.files import write_whole

from .executors import Executor
from .grid import shown_metrics
from .grid_config import GridConfig
from .grid_report import write_grid
from .plan import Plan
from .runner import Outcome, run_benchmark, tables_lock


def run_grid(config: GridConfig, command: str, executor: Executor | None = None) -> tuple[Outcome, list[Path]]:
    """Do the cells of a grid as methods of a benchmark; then write tables and plots over all that is done.

    Args:
        command: Reproduces the files; written next to the tables.

    Returns:
        The benchmark's outcome, and the files of the grid.

    Raises:
        UserError, Interrupted: as `run_benchmark`; or the protocol lacks a metric that the grid names.
    """
    check_matplotlib()
    tasks = Plan(config).tasks
    for task in tasks:
        shown_metrics(config, task)
    outcome = run_benchmark(config.benchmark(), executor)
    with tables_lock(config):
        write_whole(config.output_dir / "grid.yaml", to_yaml(config))
        files = [file for task in tasks for file in write_grid(config, task, command)]
        write_command(config.output_dir, command)
    return outcome, files

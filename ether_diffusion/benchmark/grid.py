"""A benchmark along a grid: learning rates (paper, Fig. 5 and 6), blocks (Table 9), sides (Table 11), or any settings.

The benchmark runner trains, draws and scores the cells, resumably and by any number of workers; what follows reads its
results and averages over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.analysis.output import check_matplotlib, write_command
from ether_diffusion.config import to_yaml
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.files import write_whole

from .config import WHOLE, BenchmarkConfig, Shard, Unit
from .grid_config import Cell, Coordinate, GridConfig, GridMapPart, GridSubjectPart
from .plan import Plan
from .runner import Executor, Outcome, is_scored, run_benchmark, tables_lock
from .stages import Stages
from .worker import DIVERGED, TRAINED, stages_file


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: the mean, and the range of the values that it is made of."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What all seeds of a method came to at one point of the grid.

    Attributes:
        step: Of the checkpoint that was scored; None: what the grid is about, the last one or the task's `checkpoint`.
        scored: How many seeds the values are made of.
        diverged: How many seeds' loss ceased to be finite, which have no values.
        waiting: How many seeds are not done, or failed for another reason.
        values: By metric, in the order to be shown; empty where `scored` is 0.
    """

    method: str
    point: tuple[tuple[str, Coordinate], ...]
    step: int | None
    scored: int
    diverged: int
    waiting: int
    values: Mapping[str, Spread]

    def at(self, axis: str) -> Coordinate | None:
        """Its value on an axis; None on one that the method does not have."""
        return dict(self.point).get(axis)


def run_grid(
    config: GridConfig, command: str, shard: Shard = WHOLE, executor: Executor | None = None
) -> tuple[Outcome, list[Path]]:
    """Do a shard's cells; then write tables and plots over all that is done, whoever did it.

    Args:
        command: What makes the same again, to be written beside the tables.

    Returns:
        The benchmark's outcome, and the files of the grid.

    Raises:
        UserError, Interrupted: as `run_benchmark`; or metrics that the protocol does not have.
    """
    from .grid_report import write_grid

    check_matplotlib()
    for task in tasks(config):
        shown_metrics(config, task)
    outcome = run_benchmark(config.benchmark(), shard, executor)
    with tables_lock(config):
        write_whole(config.output_dir / "grid.yaml", to_yaml(config))
        files = [file for task in tasks(config) for file in write_grid(config, task, command)]
        write_command(config.output_dir, command)
    return outcome, files


def tasks(config: GridConfig) -> list[str]:
    """Those that the grid has: `dreambooth`, `controllable`."""
    return Plan(config).tasks


def grid_part(config: GridConfig, task: str) -> GridSubjectPart | GridMapPart:
    """The settings of a task that the grid has."""
    part = config.dreambooth if task == "dreambooth" else config.controllable
    assert part is not None
    return part


def shown_metrics(config: GridConfig, task: str) -> dict[str, bool]:
    """Whether higher is better, of each metric to be shown.

    Raises:
        UserError: the protocol has none of a name that the grid's `metrics` or `references` give.
    """
    grid, (_, protocol) = grid_part(config, task).grid, Plan(config).part(task)
    known = {name: metric.higher_is_better for name, metric in protocol.metrics.items()}
    for name in (*(grid.metrics or ()), *(reference.metric for reference in grid.references)):
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(f"{task}.grid: {protocol.name} has no metric {name!r}.{near} It has {', '.join(known)}.")
    return {name: known[name] for name in grid.metrics or known}


def read_grid(config: GridConfig, task: str) -> list[Summary]:
    """What is done of a task, averaged over seeds: points in the grid's order, each with its checkpoints by step.

    Raises:
        UserError: results or stages that cannot be read.
    """
    part, plan = grid_part(config, task), Plan(config.benchmark())
    metrics = list(shown_metrics(config, task))
    points = dict.fromkeys((cell.method, cell.point) for cell in part.cells())
    summaries = []
    for method, point in points:
        cells = [Cell(method, point, seed) for seed in part.grid.seeds]
        diverged = sum(any(divergence(config, unit) for unit in _units(plan, task, cell)) for cell in cells)
        for step in (*sorted(part.also_checkpoints), None):
            done = [cell for cell in cells if all(is_scored(plan, unit) for unit in _units(plan, task, cell, step))]
            files = [plan.folder(task, cell.name, step) / RESULTS for cell in done]
            found = [Results.read(file) for file in files if file.is_file()]
            values = {name: _spread([one.metrics[name].value for one in found]) for name in metrics if found}
            waiting = len(cells) - len(found) - diverged
            summaries.append(Summary(method, point, step, len(found), diverged, waiting, values))
    return summaries


def best_points(summaries: Sequence[Summary], metric: str, higher_is_better: bool = True) -> dict[str, Summary]:
    """Of each method the point with the best mean; one where a seed diverged counts only if there is no other.

    Methods of which nothing is scored are left out.
    """
    sign = 1 if higher_is_better else -1
    best: dict[str, Summary] = {}
    for one in summaries:
        if one.step is not None or not one.scored:
            continue
        other = best.get(one.method)
        if other is None or _rank(one, metric, sign) > _rank(other, metric, sign):
            best[one.method] = one
    return best


def last_step(config: GridConfig, task: str) -> int | None:
    """The step of what the grid is about; None as long as no cell tells how many steps its epochs come to."""
    part, plan = grid_part(config, task), Plan(config.benchmark())
    if part.checkpoint is not None:
        return part.checkpoint
    units = plan.units()
    folders = (sorted((plan.run_folder(unit) / "checkpoints").glob("step-*")) for unit in units if unit.task == task)
    stated = plan.training(next(unit for unit in units if unit.task == task)).training.steps
    return stated or next((int(found[-1].name.removeprefix("step-")) for found in folders if found), None)


def divergence(config: BenchmarkConfig, unit: Unit) -> str | None:
    """What the training of a unit said when its loss ceased to be finite; None if it did not."""
    return (Stages(stages_file(Plan(config), unit)).outputs(TRAINED) or {}).get(DIVERGED)


def _units(plan: Plan, task: str, cell: Cell, step: int | None = None) -> list[Unit]:
    names = plan.names() if task == "dreambooth" else (None,)
    return [Unit(task, cell.name, name, step) for name in names]


def _rank(one: Summary, metric: str, sign: int) -> tuple[int, float]:
    mean = one.values[metric].mean
    return -one.diverged, -math.inf if math.isnan(mean) else sign * mean


def _spread(values: Sequence[float]) -> Spread:
    return Spread(sum(values) / len(values), min(values), max(values))

"""The results of a grid: those of its cells, which are methods of a benchmark, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.files import CHECKPOINTS, list_checkpoints, step_of

from .config import BenchmarkConfig, Unit
from .grid_config import Cell, Coordinate, GridConfig, GridMapPart, GridSubjectPart
from .plan import Plan
from .runner import is_scored


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: its mean, lowest and highest value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The results of a method at one point of the grid, over all seeds.

    Attributes:
        step: Of the checkpoint that was scored; None: the end of the training, or the task's `checkpoint`.
        scored: How many seeds the values average.
        diverged: How many seeds have no values because their loss ceased to be finite.
        waiting: How many seeds are not done, or failed for another reason.
        values: By metric, in the order of the tables; empty where `scored` is 0.
    """

    method: str
    point: tuple[tuple[str, Coordinate], ...]
    step: int | None
    scored: int
    diverged: int
    waiting: int
    values: Mapping[str, Spread]

    def at(self, axis: str) -> Coordinate | None:
        """The value on an axis; None if the method does not vary along it."""
        return dict(self.point).get(axis)


def grid_part(config: GridConfig, task: str) -> GridSubjectPart | GridMapPart:
    """The settings of a task that the grid has."""
    part = config.dreambooth if task == "dreambooth" else config.controllable
    assert part is not None
    return part


def shown_metrics(config: GridConfig, task: str) -> dict[str, bool]:
    """The metrics of tables and plots, and whether higher is better.

    Raises:
        UserError: the protocol lacks a metric that the grid's `metrics` or `references` name.
    """
    grid, (_, protocol) = grid_part(config, task).grid, Plan(config).part(task)
    known = {name: metric.higher_is_better for name, metric in protocol.metrics.items()}
    for name in (*(grid.metrics or ()), *(reference.metric for reference in grid.references)):
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(f"{task}.grid: {protocol.name} has no metric {name!r}.{near} It has {', '.join(known)}.")
    return {name: known[name] for name in grid.metrics or known}


def read_grid(config: GridConfig, task: str) -> list[Summary]:
    """The results of a task, averaged over seeds: points in the grid's order, each with its checkpoints by step.

    Raises:
        UserError: results or stages that cannot be read.
    """
    part, plan = grid_part(config, task), Plan(config.benchmark())
    metrics = list(shown_metrics(config, task))
    points = dict.fromkeys((cell.method, cell.point) for cell in part.cells())
    summaries = []
    for method, point in points:
        cells = [Cell(method, point, seed) for seed in part.grid.seeds]
        diverged = sum(any(plan.stages(unit).divergence() for unit in _units(plan, task, cell)) for cell in cells)
        for step in (*sorted(part.also_checkpoints), None):
            done = [cell for cell in cells if all(is_scored(plan, unit) for unit in _units(plan, task, cell, step))]
            files = [plan.folder(task, cell.name, step) / RESULTS for cell in done]
            found = [Results.read(file) for file in files if file.is_file()]
            values = {name: _spread([one.metrics[name].value for one in found]) for name in metrics if found}
            waiting = len(cells) - len(found) - diverged
            summaries.append(Summary(method, point, step, len(found), diverged, waiting, values))
    return summaries


def best_points(summaries: Sequence[Summary], metric: str, higher_is_better: bool = True) -> dict[str, Summary]:
    """The point with the best mean of each method that has scores. Points with fewer diverged seeds come first."""

    def rank(one: Summary) -> tuple[int, float]:
        mean = one.values[metric].mean
        return -one.diverged, -math.inf if math.isnan(mean) else mean if higher_is_better else -mean

    best: dict[str, Summary] = {}
    for one in summaries:
        if one.step is None and one.scored and (one.method not in best or rank(one) > rank(best[one.method])):
            best[one.method] = one
    return best


def last_step(config: GridConfig, task: str) -> int | None:
    """The step that summaries with step None show; None if its training counts epochs and has no checkpoint yet."""
    part, plan = grid_part(config, task), Plan(config.benchmark())
    units = [unit for unit in plan.units() if unit.task == task]
    if stated := part.checkpoint or plan.training(units[0]).training.steps:
        return stated
    found = (list_checkpoints(plan.run_folder(unit) / CHECKPOINTS) for unit in units)
    return next((step_of(checkpoints[-1]) for checkpoints in found if checkpoints), None)


def divergence(config: BenchmarkConfig, unit: Unit) -> str | None:
    """The message of a unit's training whose loss ceased to be finite; None if it did not."""
    return Plan(config).stages(unit).divergence()


def _units(plan: Plan, task: str, cell: Cell, step: int | None = None) -> list[Unit]:
    names = plan.names() if task == "dreambooth" else (None,)
    return [Unit(task, cell.name, name, step) for name in names]


def _spread(values: Sequence[float]) -> Spread:
    return Spread(sum(values) / len(values), min(values), max(values))

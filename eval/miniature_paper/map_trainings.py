"""How well the grid's trainings follow maps: mIoU by learning rate and step, on the same scenes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import divergence, grid_part
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.runner import is_scored
from ether_diffusion.evaluation.intervals import Estimate

from .best_rates import MAPS
from .config import RATE
from .estimates import map_estimates, mean_estimate


@dataclass(frozen=True)
class MapTraining:
    """One point of the grid, averaged over its seeds.

    Attributes:
        rate: None: the method has a rate of its own.
        miou: By step; None is the end of training. Empty if a seed diverged, or if nothing is scored.
    """

    rate: float | None
    diverged: bool
    miou: Mapping[int | None, Estimate]

    @property
    def end(self) -> Estimate | None:
        """mIoU at the end of training."""
        return self.miou.get(None)

    def by_step(self, last: int) -> dict[int, Estimate]:
        """mIoU in the order of steps, the end at step `last`."""
        return {step or last: self.miou[step] for step in sorted(self.miou, key=lambda step: step or math.inf)}


def best_of(trainings: Sequence[MapTraining]) -> MapTraining | None:
    """The training with the highest mIoU at its end; None if none is scored at its end."""
    return max((one for one in trainings if one.end is not None), key=lambda one: one.miou[None].value, default=None)


def read_trainings(grid: GridConfig) -> dict[str, list[MapTraining]]:
    """The grid's trainings by method, in the order of rates."""
    part, plan = grid_part(grid, "controllable"), Plan(grid.benchmark())
    found: dict[str, list[MapTraining]] = {}
    for method, point in dict.fromkeys((cell.method, cell.point) for cell in part.cells()):
        units = [Unit("controllable", Cell(method, point, seed).name) for seed in part.grid.seeds]
        rate = dict(point).get(RATE)
        diverged = any(divergence(plan.config, unit) for unit in units)
        miou = {}
        for step in (*part.also_checkpoints, None):
            readings = [Unit(unit.task, unit.method, step=step) for unit in units]
            estimates = [map_estimates(plan, reading)[MAPS] for reading in readings if is_scored(plan, reading)]
            if estimates and not diverged:
                miou[step] = mean_estimate(estimates)
        found.setdefault(method, []).append(MapTraining(None if rate is None else float(rate), diverged, miou))
    return {method: sorted(trainings, key=lambda one: one.rate or 0) for method, trainings in found.items()}

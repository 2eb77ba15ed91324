"""How trainings of the miniature paper's grid follow maps: mIoU by learning rate and step, on scenes that all share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import divergence, grid_part
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.runner import is_scored

from .choice import MAPS
from .config import RATE, PaperConfig
from .counts import read_counts
from .estimates import Estimate, map_estimates, mean_estimate


@dataclass(frozen=True)
class MapTraining:
    """One point of the grid, its seeds averaged.

    Attributes:
        rate: None: the method has one of its own.
        miou: By step, None being the end; empty where a seed diverged, and as long as nothing is scored.
    """

    rate: float | None
    diverged: bool
    miou: Mapping[int | None, Estimate]

    @property
    def end(self) -> Estimate | None:
        return self.miou.get(None)

    def by_step(self, last: int) -> dict[int, Estimate]:
        """In order; the end is at step `last`."""
        return {step or last: self.miou[step] for step in sorted(self.miou, key=lambda step: step or math.inf)}


def best_of(trainings: Sequence[MapTraining]) -> MapTraining | None:
    """The one with the highest mIoU at its end, of those that have one."""
    return max((one for one in trainings if one.end is not None), key=lambda one: one.miou[None].value, default=None)


def counts_file(config: PaperConfig, use: str, reading: Unit) -> Path:
    """Of what the segmenter saw in the images of the `rates` or of the `tables`."""
    step = "" if reading.step is None else f"-step_{reading.step}"
    return config.output_dir / "analyses" / "scenes" / use / f"{reading.method}{step}.json"


def map_readings(plan: Plan) -> Iterator[Unit]:
    """What is drawn and scored of all trainings on maps."""
    for unit in plan.units():
        if unit.task == "controllable":
            yield from (reading for reading in plan.readings(unit) if is_scored(plan, reading))


def read_trainings(config: PaperConfig, grid: GridConfig) -> dict[str, list[MapTraining]]:
    """By method, in the order of rates."""
    part, plan = grid_part(grid, "controllable"), Plan(grid.benchmark())
    protocol = plan.part("controllable")[1]
    metric = protocol.metrics[MAPS]
    assert metric.kind == "segmentation"
    found: dict[str, list[MapTraining]] = {}
    for method, point in dict.fromkeys((cell.method, cell.point) for cell in part.cells()):
        units = [Unit("controllable", Cell(method, point, seed).name) for seed in part.grid.seeds]
        rate = dict(point).get(RATE)
        diverged = any(divergence(plan.config, unit) for unit in units)
        miou = {}
        for step in (*part.also_checkpoints, None):
            files = [counts_file(config, "rates", Unit(unit.task, unit.method, step=step)) for unit in units]
            counts = [counts for file in files if (counts := read_counts(file)) is not None]
            if counts and not diverged:
                estimates = [map_estimates(one[metric.judge], protocol.bootstrap)[metric.value] for one in counts]
                miou[step] = mean_estimate(estimates)
        found.setdefault(method, []).append(MapTraining(None if rate is None else float(rate), diverged, miou))
    return {method: sorted(trainings, key=lambda one: one.rate or 0) for method, trainings in found.items()}

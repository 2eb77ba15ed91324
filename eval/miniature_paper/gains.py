"""What trainings on maps add to the encoder alone. Much of mIoU itself comes from captions, without any map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import divergence, grid_part
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.runner import is_scored
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.intervals import Estimate, Interval, quantiles, t_interval
from ether_diffusion.evaluation.map_scores import segmentation_estimates
from ether_diffusion.evaluation.protocols import MapProtocol
from ether_diffusion.evaluation.results import Results

from .best_rates import MAPS
from .config import RATE
from .interval_verdicts import Verdict, above, all_of


def map_estimates(plan: Plan, reading: Unit) -> dict[str, Estimate]:
    """The segmentation metrics of a scored reading. All readings of one plan share the scenes and their samples.

    Raises:
        UserError: results.json has no counts of images, or not of all scenes.
    """
    protocol = plan.part(reading.task)[1]
    assert isinstance(protocol, MapProtocol)
    file, found = plan.scores_file(reading), {}
    results = Results.read(file)
    metrics = {name: metric for name, metric in protocol.metrics.items() if metric.kind == "segmentation"}
    for segmenter in dict.fromkeys(metric.judge for metric in metrics.values()):
        counts = results.class_counts(segmenter, protocol.num_classes)
        if len(counts) != len(plan.scenes):
            raise UserError(
                f"{file}: per_image.{segmenter} has {len(counts)} of {len(plan.scenes)} scenes. Delete the file and "
                "run the same command again: it scores the images again."
            )
        found[segmenter] = segmentation_estimates(counts, protocol.bootstrap)
    return {name: found[metric.judge][metric.value] for name, metric in metrics.items()}


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several trainings on the same scenes."""
    replicas = torch.stack([one.replicas for one in estimates]).mean(dim=0)
    return Estimate(math.fsum(one.value for one in estimates) / len(estimates), replicas, estimates[0].level)


def over_subjects(one: Mapping[str, float], other: Mapping[str, float], level: float = 0.95) -> Interval:
    """The t interval of the mean difference between two methods; every subject counts once.

    Args:
        one, other: Means of two methods, by subject.
    """
    return t_interval([one[subject] - other[subject] for subject in one], level)


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


KEEPS = 0.75
"""The share of its own largest gain that a method keeps at a rate that suits it."""
LOSES = 0.5
"""The share of its own largest gain below which a method no longer follows maps."""
SOON = 0.9
"""The share of a training's largest gain that counts as near its best."""


Gains = tuple[Estimate, Estimate]
"""A gain over the encoder alone, and the largest that it is compared with."""


def end_gains(training: MapTraining, trainings: Sequence[MapTraining], alone: Estimate | None) -> Gains | None:
    """The gain at the end of a training, and the largest of its method; None if one of them was not measured."""
    best = best_of(trainings)
    if training.end is None or best is None or best.end is None or alone is None:
        return None
    return training.end - alone, best.end - alone


def early_gains(training: MapTraining, step: int, alone: Estimate | None) -> Gains | None:
    """The gain of a training at a step, and the largest of its own checkpoints; None if it was not measured."""
    if step not in training.miou or alone is None:
        return None
    largest = max(training.miou.values(), key=lambda one: one.value)
    return training.miou[step] - alone, largest - alone


def has(training: MapTraining, gains: Gains | None, share: float) -> Verdict:
    """Whether a gain is above 0 and above this share of the largest. That of a diverged training is not."""
    if training.diverged or gains is None:
        return "does not hold" if training.diverged else "not measured"
    gain, largest = gains
    return all_of([above(gain.interval()), above((gain - largest * share).interval())])


def loses(training: MapTraining, gains: Gains | None) -> Verdict:
    """Whether a gain is below half of the largest. That of a diverged training is."""
    if training.diverged or gains is None:
        return "holds" if training.diverged else "not measured"
    gain, largest = gains
    return above((largest * LOSES - gain).interval())


def share(training: MapTraining, gains: Gains | None) -> str:
    """A gain as a share of the largest, with the interval; both numbers if the largest may be 0."""
    if training.diverged or gains is None:
        return "diverged" if training.diverged else "not measured"
    gain, largest = gains
    if largest.value <= 0:
        return "no gain over the encoder alone"
    if float(largest.replicas.min()) <= 0:  # a share of it would mean nothing
        return f"{100 * gain.value:+.1f} of {100 * largest.value:+.1f} points of mIoU"
    low, high = quantiles(gain.replicas / largest.replicas, gain.level)
    value = f"{gain.value / largest.value:.0%}"
    return value if low == high else f"{value} [{low:.0%}, {high:.0%}]"


def more(some: Sequence[Sequence[Verdict]], others: Sequence[Sequence[Verdict]]) -> Verdict:
    """Whether more verdicts hold in each of `some` than in each of `others`, whatever the undecided ones are."""
    if any("not measured" in found for found in (*some, *others)):
        return "not measured"
    if min(map(_sure, some)) > max(map(_possible, others)):
        return "holds"
    return "does not hold" if min(map(_possible, some)) <= max(map(_sure, others)) else "undecided"


def count(found: Sequence[Verdict]) -> str:
    """How many verdicts hold, in words; a range if some are undecided."""
    sure, possible = _sure(found), _possible(found)
    return f"{sure} of {len(found)}" if sure == possible else f"{sure} to {possible} of {len(found)}"


def _sure(found: Sequence[Verdict]) -> int:
    return sum(verdict == "holds" for verdict in found)


def _possible(found: Sequence[Verdict]) -> int:
    return sum(verdict != "does not hold" for verdict in found)

"""The miniature paper's estimates of label maps, from the counts of each image in results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.intervals import Estimate, Interval, t_interval
from ether_diffusion.evaluation.map_scores import segmentation_estimates
from ether_diffusion.evaluation.protocols import MapProtocol
from ether_diffusion.evaluation.results import Results


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

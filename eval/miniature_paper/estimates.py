"""Differences of the miniature paper with their 95% intervals: over few subjects, and over scenes that all share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ether_diffusion.evaluation.averages import about, bootstrap_indices
from ether_diffusion.evaluation.protocols import Bootstrap
from ether_diffusion.metrics.segmentation import scores


@dataclass(frozen=True)
class Difference:
    """How much higher one number is than another, and the interval of that."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number found on some scenes, and what it is on the same ones drawn with replacement.

    All estimates on the same scenes have the same draws, so that what the scenes do to all of them drops out of their
    differences.

    Attributes:
        replicas: (R,) float64.
        level: Of intervals.
    """

    value: float
    replicas: Tensor
    level: float = 0.95

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.replicas - other.replicas, self.level)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.replicas, self.level)

    def interval(self) -> Difference:
        """From 0."""
        return Difference(self.value, *about(self.value, self.replicas, self.level))


def map_estimates(counts: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Of each of `segmentation.scores`' numbers.

    Args:
        counts: (N, 3, C), as `class_counts` gives them, of N scenes.
    """
    counts, draws = counts.double(), bootstrap_indices(len(counts), bootstrap)
    times = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())
    sums = (times @ counts.flatten(1)).view(-1, *counts.shape[1:])
    found, drawn = scores(*counts.sum(dim=0)), [scores(*one) for one in sums]
    return {
        name: Estimate(value, torch.tensor([one[name] for one in drawn], dtype=torch.float64), bootstrap.level)
        for name, value in found.items()
        if isinstance(value, float)
    }


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Of several trainings on the same scenes."""
    replicas = torch.stack([one.replicas for one in estimates]).mean(dim=0)
    return Estimate(math.fsum(one.value for one in estimates) / len(estimates), replicas, estimates[0].level)


def over_subjects(one: Mapping[str, float], other: Mapping[str, float], level: float = 0.95) -> Difference:
    """The t interval of the mean difference of the same subjects, each of which counts once.

    A bootstrap draws from the few subjects that are there, and is too narrow: of three, 95% become about 75%. Of one
    subject the interval is endless.

    Args:
        one, other: Means of two methods, by subject.
    """
    found = [one[subject] - other[subject] for subject in one]
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Difference(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1)
    reach = t_quantile(level, len(found) - 1) * math.sqrt(variance / len(found))
    return Difference(mean, mean - reach, mean + reach)


@cache
def t_quantile(level: float, degrees: int) -> float:
    """What Student's t stays within, in size, with this probability; to 1e-6.

    With t = sqrt(n) tan(a) the density is proportional to cos(a) to the power of n - 1.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    within = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(np.interp(level, within / within[-1], angles))

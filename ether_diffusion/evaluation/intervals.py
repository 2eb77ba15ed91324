"""Intervals of numbers: by the bootstrap and the jackknife (Efron and Tibshirani 1993, chapters 8, 11 and 13), and by
Student's t.

The bootstrap computes a number again on samples of its data, drawn with replacement. Samples depend on the seed and on
the size of the data alone: all numbers of the same images share them, and so differences between numbers are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from ether_diffusion.config import Settings
from ether_diffusion.limits import Seed
from ether_diffusion.randomness import generator

Bounds = tuple[float, float]
"""The lowest and the highest value that a metric can have. Intervals end there."""

ANY: Bounds = (-math.inf, math.inf)


class Bootstrap(Settings):
    """How many samples are drawn, from which seed, and the level of the intervals."""

    replicates: Annotated[int, Field(ge=1, le=100_000)] = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Seed = 0


@dataclass(frozen=True)
class Interval:
    """A number and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number, and the same number on each sample of the bootstrap.

    Differences between estimates on the same samples are paired: what an image does to both cancels.

    Attributes:
        replicas: (R,) float64.
        level: Of the interval.
    """

    value: float
    replicas: Tensor
    level: float = 0.95

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.replicas - other.replicas, self.level)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.replicas, self.level)

    def interval(self, bounds: Bounds = ANY) -> Interval:
        """The quantiles of the replicas about their own mean, laid about the value.

        A sample holds some images twice and lacks others, which lifts FID and lowers mIoU. This shift says nothing
        about the error of the value, so it is taken out. The interval ends at the bounds, and always holds the value.
        """
        low, high = (edge - float(self.replicas.mean()) for edge in quantiles(self.replicas, self.level))
        lowest, highest = min(bounds[0], self.value), max(bounds[1], self.value)  # a value may round to beyond them
        return Interval(self.value, max(self.value + min(low, 0.0), lowest), min(self.value + max(high, 0.0), highest))


def quantiles(replicas: Tensor, level: float) -> tuple[float, float]:
    """The two values between which this share of the replicas lies, in the middle."""
    edges: Any = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(replicas, edges).tolist()
    return low, high


def image_samples(size: int, bootstrap: Bootstrap) -> Tensor:
    """(replicates, size) int64: indices of images, drawn with replacement."""
    return torch.randint(size, (bootstrap.replicates, size), generator=generator(bootstrap.seed, "bootstrap/images"))


def sample_sums(values: Tensor, samples: Tensor) -> Tensor:
    """(R, ...) float64: sums of the images' values (N, ...) over samples (R, N) of `image_samples`."""
    times = torch.zeros(samples.shape, dtype=torch.float64)
    times.scatter_add_(1, samples, torch.ones_like(times))
    return (times @ values.double().flatten(1)).view(-1, *values.shape[1:])


def subject_sample_sums(subjects: Sequence[Tensor], bootstrap: Bootstrap) -> Tensor:
    """(R, S, K) float64: samples of S subjects, and for each of them the sum over a sample of its prompts.

    Subjects and prompts are what a benchmark samples; images of one prompt are too similar to count as independent.
    With one subject only its prompts are resampled.

    Args:
        subjects: (prompts, K) float64, of each subject.
    """
    n, rng = len(subjects), generator(bootstrap.seed, "bootstrap/subjects")
    chosen = torch.randint(n, (bootstrap.replicates, n), generator=rng)
    sums = torch.zeros(bootstrap.replicates, n, subjects[0].shape[1], dtype=torch.float64)
    for place in range(n):
        for k, prompts in enumerate(subjects):
            rows = (chosen[:, place] == k).nonzero().flatten()
            sample = torch.randint(len(prompts), (len(rows), len(prompts)), generator=rng)
            sums[rows, place] = prompts[sample].sum(dim=1)
    return sums


def jackknife_interval(
    values: Tensor, statistic: Callable[[Tensor], float], groups: int, level: float = 0.95, bounds: Bounds = ANY
) -> Interval:
    """The interval of a number of independent rows, by the delete-a-group jackknife and Student's t.

    For distances between distributions: a bootstrap sample holds images twice, which such a distance counts as
    structure, so that its intervals come out too wide. Where both distributions are equal, this one is too wide, too.

    Args:
        values: (N, …), at least three rows.
        statistic: The number of some of the rows.
        groups: How many groups are left out in turn, at most; each is every G-th row of a random order.
    """
    count = min(groups, len(values))
    order = torch.randperm(len(values), generator=generator(0, "jackknife"))
    group_of = torch.empty(len(values), dtype=torch.int64)
    group_of[order] = torch.arange(len(values)) % count
    without = torch.tensor([statistic(values[group_of != k]) for k in range(count)], dtype=torch.float64)
    variance = (count - 1) / count * float((without - without.mean()).square().sum())
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(variance)
    value = statistic(values)
    lowest, highest = min(bounds[0], value), max(bounds[1], value)
    return Interval(value, max(value - reach, lowest), min(value + reach, highest))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, such as one of each subject.

    For few values: a bootstrap of three covers about 75% instead of 95%. The interval of a single value is unbounded.
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - reach, mean + reach)

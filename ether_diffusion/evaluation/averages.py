"""Averages over subjects and prompts, and their bootstrap intervals (Efron and Tibshirani 1993, chapters 8 and 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.randomness import generator

from .protocols import Averaging, Bootstrap, Bounds

Cluster = tuple[float, int]
"""The sum over the pairs of one prompt's images, and how many they are."""

ANY: Bounds = (-math.inf, math.inf)

Clusters = Mapping[str, Mapping[str, Cluster]]
"""By subject and prompt."""


def clusters_of(pairs: Pairs, prompt_of: Mapping[str, str]) -> dict[str, Cluster]:
    """The pairs of one subject by prompt.

    Args:
        prompt_of: The prompt of each row's image.
    """
    sums = pairs.values.where(pairs.counted, 0).sum(dim=1).tolist()
    counts = pairs.counted.sum(dim=1).tolist()
    found: dict[str, Cluster] = {}
    for row, total, count in zip(pairs.rows, sums, counts, strict=True):
        if count:
            before = found.get(prompt_of[row], (0.0, 0))
            found[prompt_of[row]] = (before[0] + total, before[1] + count)
    return found


def average(clusters: Clusters, averaging: Averaging) -> float:
    """flat: over all pairs. macro: over the pairs of each subject, then over subjects."""
    totals = [_total(prompts) for _, prompts in sorted(clusters.items())]
    if averaging == "flat":
        return sum(total for total, _ in totals) / sum(count for _, count in totals)
    return sum(total / count for total, count in totals) / len(totals)


def per_subject(clusters: Clusters) -> dict[str, float]:
    """The mean over the pairs of each subject."""
    return {name: (total := _total(prompts))[0] / total[1] for name, prompts in sorted(clusters.items())}


def per_prompt(clusters: Clusters, averaging: Averaging) -> dict[str, float]:
    """The same average for the images of each prompt alone, over the subjects that have it."""
    prompts = dict.fromkeys(prompt for _, found in sorted(clusters.items()) for prompt in found)

    def alone(prompt: str) -> Clusters:
        return {name: {prompt: found[prompt]} for name, found in clusters.items() if prompt in found}

    return {prompt: average(alone(prompt), averaging) for prompt in prompts}


def interval(
    clusters: Clusters, averaging: Averaging, bootstrap: Bootstrap, bounds: Bounds = ANY
) -> tuple[float, float]:
    """Of `average`, by drawing subjects with replacement and, for each, its prompts with all their images.

    Subjects and prompts are what a benchmark samples; images of one prompt are too alike to count as independent. With
    one subject the interval speaks of prompts alone. The same draws for every metric of the same images.

    Args:
        bounds: As for `about`.
    """
    names = sorted(clusters)
    tables = [torch.tensor([clusters[s][p] for p in sorted(clusters[s])], dtype=torch.float64) for s in names]
    n, draws = len(names), generator(bootstrap.seed, "bootstrap/subjects")
    chosen = torch.randint(n, (bootstrap.replicates, n), generator=draws)
    sums = torch.zeros(bootstrap.replicates, n, 2, dtype=torch.float64)
    for slot in range(n):
        for k, table in enumerate(tables):
            at = (chosen[:, slot] == k).nonzero().flatten()
            prompts = torch.randint(len(table), (len(at), len(table)), generator=draws)
            sums[at, slot] = table[prompts].sum(dim=1)
    if averaging == "flat":
        total = sums.sum(dim=1)
        replicas = total[:, 0] / total[:, 1]
    else:
        replicas = (sums[..., 0] / sums[..., 1]).mean(dim=1)
    return about(average(clusters, averaging), replicas, bootstrap.level, bounds)


def bootstrap_indices(size: int, bootstrap: Bootstrap) -> Tensor:
    """(replicates, size) int64: numbers of images, drawn with replacement."""
    draws = generator(bootstrap.seed, "bootstrap/images")
    return torch.randint(size, (bootstrap.replicates, size), generator=draws)


def about(value: float, replicas: Tensor, level: float, bounds: Bounds = ANY) -> tuple[float, float]:
    """The quantiles of replicas about their own mean, laid about the value.

    A drawn set holds some images twice and lacks others, which lifts FID and lowers mIoU: that shift says nothing of
    how far the value may be off. The shift back may lead beyond what a value can be, where the interval ends.

    Args:
        bounds: The lowest and the highest that a value can be.
    """
    edges: Any = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (torch.quantile(replicas, edges) - replicas.mean()).tolist()
    lowest, highest = (min(bounds[0], value), max(bounds[1], value))  # rounding may lay a value itself beyond them
    return max(value + min(low, 0.0), lowest), min(value + max(high, 0.0), highest)


def _total(prompts: Mapping[str, Cluster]) -> Cluster:
    ordered = [cluster for _, cluster in sorted(prompts.items())]
    return sum(total for total, _ in ordered), sum(count for _, count in ordered)

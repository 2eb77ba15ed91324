"""Averages over the subjects and prompts of a protocol, with what the bootstrap needs of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ether_diffusion.metrics.pairwise import Pairs

from .intervals import Bootstrap, Estimate, subject_sample_sums
from .protocols import Averaging

Cluster = tuple[float, int]
"""The sum of the values of all pairs with images of one prompt, and the number of these pairs."""

Clusters = Mapping[str, Mapping[str, Cluster]]
"""By subject and prompt."""


def clusters_of(pairs: Pairs, prompt_of: Mapping[str, str]) -> dict[str, Cluster]:
    """The pairs of one subject, summed by the prompt of each row's image."""
    sums = pairs.values.where(pairs.counted, 0).sum(dim=1).tolist()
    counts = pairs.counted.sum(dim=1).tolist()
    found: dict[str, Cluster] = {}
    for row, total, count in zip(pairs.rows, sums, counts, strict=True):
        if count:
            before = found.get(prompt_of[row], (0.0, 0))
            found[prompt_of[row]] = (before[0] + total, before[1] + count)
    return found


def average(clusters: Clusters, averaging: Averaging) -> float:
    """flat: the mean over all pairs. macro: the mean over subjects of the mean over each one's pairs."""
    totals = [_total(prompts) for _, prompts in sorted(clusters.items())]
    if averaging == "flat":
        return sum(total for total, _ in totals) / sum(count for _, count in totals)
    return sum(total / count for total, count in totals) / len(totals)


def per_subject(clusters: Clusters) -> dict[str, float]:
    """The mean over the pairs of each subject."""
    return {name: (total := _total(prompts))[0] / total[1] for name, prompts in sorted(clusters.items())}


def per_prompt(clusters: Clusters, averaging: Averaging) -> dict[str, float]:
    """The average over the images of each prompt alone, over the subjects that have it."""
    prompts = dict.fromkeys(prompt for _, found in sorted(clusters.items()) for prompt in found)

    def alone(prompt: str) -> Clusters:
        return {name: {prompt: found[prompt]} for name, found in clusters.items() if prompt in found}

    return {prompt: average(alone(prompt), averaging) for prompt in prompts}


def estimate(clusters: Clusters, averaging: Averaging, bootstrap: Bootstrap) -> Estimate:
    """The average, and the same on samples of subjects and prompts; all metrics of the same images share them."""
    tables = [[prompts[name] for name in sorted(prompts)] for _, prompts in sorted(clusters.items())]
    sums = subject_sample_sums([torch.tensor(table, dtype=torch.float64) for table in tables], bootstrap)
    if averaging == "flat":
        total = sums.sum(dim=1)
        replicas = total[:, 0] / total[:, 1]
    else:
        replicas = (sums[..., 0] / sums[..., 1]).mean(dim=1)
    return Estimate(average(clusters, averaging), replicas, bootstrap.level)


def _total(prompts: Mapping[str, Cluster]) -> Cluster:
    ordered = [cluster for _, cluster in sorted(prompts.items())]
    return sum(total for total, _ in ordered), sum(count for _, count in ordered)

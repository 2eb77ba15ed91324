"""Averages by hand; their intervals against SciPy's bootstrap, and the laws of every interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap

from ether_diffusion.evaluation.intervals import Bootstrap
from ether_diffusion.evaluation.protocols import Averaging
from ether_diffusion.evaluation.subject_scores import Clusters, average, clusters_of, estimate, per_prompt, per_subject
from ether_diffusion.metrics.pairwise import Pairs

# Two subjects: of `a` two pairs, .2 and .4; of `b` six, .9 each.
BY_HAND = {"a": {"snow": (0.2, 1), "night": (0.4, 1)}, "b": {"snow": (2.7, 3), "night": (2.7, 3)}}


def interval(clusters: Clusters, averaging: Averaging, bootstrap: Bootstrap) -> tuple[float, float]:
    found = estimate(clusters, averaging, bootstrap).interval()
    return found.low, found.high


def test_flat_and_macro_by_hand() -> None:
    assert average(BY_HAND, "flat") == pytest.approx((0.2 + 0.4 + 6 * 0.9) / 8)
    assert average(BY_HAND, "macro") == pytest.approx((0.3 + 0.9) / 2)
    assert per_subject(BY_HAND) == pytest.approx({"a": 0.3, "b": 0.9})
    assert per_prompt(BY_HAND, "macro") == pytest.approx({"snow": 0.55, "night": 0.65})
    assert per_prompt(BY_HAND, "flat") == pytest.approx({"snow": 2.9 / 4, "night": 3.1 / 4})


def test_pairs_are_summed_by_prompt() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    counted = torch.tensor([[True, True], [True, False], [False, False]])
    pairs = Pairs(("x", "y", "z"), ("p", "q"), values, counted)
    assert clusters_of(pairs, {"x": "snow", "y": "night", "z": "snow"}) == {"snow": (3.0, 2), "night": (3.0, 1)}


def sampled(subjects: int, prompts: int = 1, seed: int = 0) -> dict[str, dict[str, tuple[float, int]]]:
    values = np.random.default_rng(seed).normal(0.5, 0.1, (subjects, prompts))
    return {f"{s:03d}": {f"{p:03d}": (4 * float(v), 4) for p, v in enumerate(row)} for s, row in enumerate(values)}


@pytest.mark.parametrize("averaging", ["flat", "macro"])
def test_over_subjects_of_one_prompt_the_interval_agrees_with_scipy(averaging: Averaging) -> None:
    clusters = sampled(25)
    values = [total / count for prompts in clusters.values() for total, count in prompts.values()]
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = interval(clusters, averaging, Bootstrap(replicates=20_000, level=0.9))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.002)  # of a width of 0.06


def test_with_one_subject_only_prompts_are_resampled() -> None:
    (prompts,) = sampled(1, 25).values()
    values = [total / count for total, count in prompts.values()]
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = interval({"a": prompts}, "macro", Bootstrap(replicates=20_000))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)  # of a width of 0.08


@pytest.mark.parametrize("averaging", ["flat", "macro"])
def test_intervals_contain_the_value_and_shrink_with_subjects_and_prompts(averaging: Averaging) -> None:
    widths = {}
    for size in ((4, 4), (4, 64), (32, 4)):
        found = []
        for seed in range(3):
            clusters = sampled(*size, seed)
            low, high = interval(clusters, averaging, Bootstrap(replicates=300))
            assert low < average(clusters, averaging) < high
            found.append(high - low)
        widths[size] = sum(found)
    assert widths[4, 64] < 0.6 * widths[4, 4]
    assert widths[32, 4] < 0.6 * widths[4, 4]


def test_intervals_depend_on_the_seed_and_not_on_the_order() -> None:
    clusters = sampled(5, 3)
    turned = {s: dict(reversed(prompts.items())) for s, prompts in reversed(clusters.items())}
    first = interval(clusters, "macro", Bootstrap())
    assert interval(turned, "macro", Bootstrap()) == first
    assert interval(clusters, "macro", Bootstrap(seed=1)) != first
    narrow = interval(clusters, "macro", Bootstrap(level=0.5))
    assert first[0] < narrow[0] < narrow[1] < first[1]

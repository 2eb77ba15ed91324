"""Averages by hand; intervals against SciPy's bootstrap, and the laws that every interval has to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap

from ether_diffusion.evaluation.averages import about, average, clusters_of, interval, per_prompt, per_subject
from ether_diffusion.evaluation.protocols import Averaging, Bootstrap, MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.metrics.pairwise import Pairs

# Two subjects: of `a` two pairs, .2 and .4; of `b` six, .9 each.
BY_HAND = {"a": {"snow": (0.2, 1), "night": (0.4, 1)}, "b": {"snow": (2.7, 3), "night": (2.7, 3)}}


def test_flat_and_macro_by_hand() -> None:
    assert average(BY_HAND, "flat") == pytest.approx((0.2 + 0.4 + 6 * 0.9) / 8)
    assert average(BY_HAND, "macro") == pytest.approx((0.3 + 0.9) / 2)
    assert per_subject(BY_HAND) == pytest.approx({"a": 0.3, "b": 0.9})
    assert per_prompt(BY_HAND, "macro") == pytest.approx({"snow": 0.55, "night": 0.65})
    assert per_prompt(BY_HAND, "flat") == pytest.approx({"snow": 2.9 / 4, "night": 3.1 / 4})


def test_pairs_fall_into_the_clusters_of_their_prompts() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    counted = torch.tensor([[True, True], [True, False], [False, False]])
    pairs = Pairs(("x", "y", "z"), ("p", "q"), values, counted)
    assert clusters_of(pairs, {"x": "snow", "y": "night", "z": "snow"}) == {"snow": (3.0, 2), "night": (3.0, 1)}


def sampled(subjects: int, prompts: int = 1, seed: int = 0) -> dict[str, dict[str, tuple[float, int]]]:
    values = np.random.default_rng(seed).normal(0.5, 0.1, (subjects, prompts))
    return {f"{s:03d}": {f"{p:03d}": (4 * float(v), 4) for p, v in enumerate(row)} for s, row in enumerate(values)}


@pytest.mark.parametrize("averaging", ["flat", "macro"])
def test_over_subjects_of_one_prompt_the_interval_is_scipys(averaging: Averaging) -> None:
    clusters = sampled(25)
    values = [total / count for prompts in clusters.values() for total, count in prompts.values()]
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = interval(clusters, averaging, Bootstrap(replicates=20_000, level=0.9))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.002)  # of a width of 0.06


def test_of_one_subject_the_interval_speaks_of_its_prompts() -> None:
    (prompts,) = sampled(1, 25).values()
    values = [total / count for total, count in prompts.values()]
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = interval({"a": prompts}, "macro", Bootstrap(replicates=20_000))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)  # of a width of 0.08


@pytest.mark.parametrize("averaging", ["flat", "macro"])
def test_intervals_hold_their_value_and_shrink_with_subjects_and_prompts(averaging: Averaging) -> None:
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


def test_intervals_depend_on_the_seed_and_on_no_order() -> None:
    clusters = sampled(5, 3)
    turned = {s: dict(reversed(prompts.items())) for s, prompts in reversed(clusters.items())}
    first = interval(clusters, "macro", Bootstrap())
    assert interval(turned, "macro", Bootstrap()) == first
    assert interval(clusters, "macro", Bootstrap(seed=1)) != first
    narrow = interval(clusters, "macro", Bootstrap(level=0.5))
    assert first[0] < narrow[0] < narrow[1] < first[1]


def test_the_bias_of_replicas_does_not_move_an_interval() -> None:
    replicas = torch.linspace(-1, 1, 101).double()
    assert about(5.0, replicas + 3, 0.9) == pytest.approx((4.1, 5.9))
    assert about(5.0, torch.full((10,), 7.0).double(), 0.9) == (5.0, 5.0)


def test_intervals_end_where_values_do() -> None:
    """A value near the end of its range: laid about it, the replicas' quantiles would lead beyond."""
    replicas = torch.tensor([0.5, *[1.0] * 9]).double()
    beyond = about(0.98, replicas, 0.95)
    assert beyond[1] > 1
    assert about(0.98, replicas, 0.95, (-1, 1)) == (beyond[0], 1.0)
    assert about(1 + 1e-9, replicas, 0.95, (-1, 1))[1] == 1 + 1e-9  # holds its value, whatever rounding made of it
    assert about(0.01, -replicas, 0.95, (0, math.inf))[0] == 0.0
    unequal = {"a": {"snow": (8.0, 8)}, "b": {"snow": (0.2, 1)}}  # flat: its replicas are low by their mean
    assert interval(unequal, "flat", Bootstrap())[1] > 1
    assert interval(unequal, "flat", Bootstrap(), (-1, 1))[1] == 1.0


def test_each_kind_of_metric_has_its_range() -> None:
    subjects = load_protocol(SubjectProtocol, "dreambooth/subject-macro-v1").metrics
    maps = load_protocol(MapProtocol, "s2i/csail-v1").metrics
    cosine, distance, share = (-1, 1), (0, math.inf), (0, 1)
    assert {subjects[name].bounds for name in subjects if name.startswith(("DINO", "CLIP"))} == {cosine}
    assert {subjects[name].bounds for name in subjects if name.startswith("LPIPS")} == {distance}
    assert (maps["FID"].bounds, maps["KID"].bounds) == (distance, (-math.inf, math.inf))
    assert {maps[name].bounds for name in maps if name not in ("FID", "KID")} == {share}

"""Intervals: the bootstrap's samples and values stay as published results have them; bounds; Student's t."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch

from ether_diffusion.evaluation.intervals import (
    ANY,
    Bootstrap,
    Bounds,
    Estimate,
    Interval,
    image_samples,
    jackknife_interval,
    quantiles,
    sample_sums,
    t_interval,
)
from ether_diffusion.evaluation.map_scores import segmentation_estimates
from ether_diffusion.evaluation.protocols import Averaging, MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.evaluation.subject_scores import estimate
from ether_diffusion.metrics.fid import frechet_distance, kernel_distance
from ether_diffusion.metrics.segmentation import scores
from ether_diffusion.randomness import generator

Distance = Callable[[torch.Tensor, torch.Tensor], float]


def interval(value: float, replicas: torch.Tensor, level: float, bounds: Bounds = ANY) -> tuple[float, float]:
    found = Estimate(value, replicas, level).interval(bounds)
    assert found.value == value
    return found.low, found.high


def class_counts(seed: int, scenes: int = 40, classes: int = 5) -> torch.Tensor:
    """Counts of scenes of very different difficulty."""
    rng = generator(seed, "test/scenes")
    true = torch.randint(0, 200, (scenes, classes), generator=rng)
    right = (true * torch.rand(scenes, 1, generator=rng)).long()
    return torch.stack([right, true, true], dim=1)


def test_samples_of_images_are_those_of_published_results() -> None:
    assert image_samples(5, Bootstrap(replicates=3)).tolist() == [[0, 1, 0, 0, 2], [0, 4, 2, 2, 1], [1, 2, 1, 4, 3]]


@pytest.mark.parametrize(
    ("averaging", "standard", "own"),
    [
        ("flat", (0.38143190476190464, 0.9480985714285715), (0.45701298701298704, 0.8903463203463203)),
        ("macro", (0.33254999999999996, 0.8992166666666667), (0.41190476190476194, 0.7785714285714286)),
    ],
)
def test_intervals_over_subjects_are_those_of_published_results(
    averaging: Averaging, standard: tuple[float, float], own: tuple[float, float]
) -> None:
    clusters = {
        "a": {"snow": (0.2, 1), "night": (0.4, 1)},
        "b": {"snow": (2.7, 3), "night": (2.7, 3)},
        "c": {"snow": (1.1, 2)},
    }
    for bootstrap, expected in ((Bootstrap(), standard), (Bootstrap(replicates=77, level=0.8, seed=5), own)):
        found = estimate(clusters, averaging, bootstrap).interval()
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


def test_intervals_over_images_are_those_of_published_results() -> None:
    one, other = (segmentation_estimates(class_counts(seed), Bootstrap()) for seed in (0, 1))
    expected = {
        "miou": (0.3277199442308831, 0.24971500188205642, 0.4090698300538898),
        "mean_accuracy": (0.49328778820594466, 0.40094961546628194, 0.5814051348848128),
        "pixel_accuracy": (0.49391763154037815, 0.40168851839946, 0.5838502360847578),
    }
    for name, values in expected.items():
        found = one[name].interval()
        assert (found.value, found.low, found.high) == pytest.approx(values, rel=1e-12)
    paired = (one["miou"] - other["miou"]).interval()
    values = (0.0016423853315711834, -0.10169734005074998, 0.10880357010839699)
    assert (paired.value, paired.low, paired.high) == pytest.approx(values, rel=1e-12)


def test_sums_over_samples_are_those_of_the_images_in_them() -> None:
    counts, samples = class_counts(2, scenes=6), image_samples(6, Bootstrap(replicates=9))
    sums = sample_sums(counts, samples)
    assert torch.equal(sums, torch.stack([counts[sample].sum(dim=0) for sample in samples]).double())


def test_estimates_are_those_of_the_whole_set() -> None:
    counts = class_counts(1)
    stated = scores(*counts.sum(dim=0))
    for name, found in segmentation_estimates(counts, Bootstrap(replicates=50)).items():
        assert found.value == stated[name]
        assert len(found.replicas) == 50


def test_equal_images_differ_by_zero() -> None:
    one, other = (segmentation_estimates(class_counts(0), Bootstrap()) for _ in range(2))
    for name in ("miou", "pixel_accuracy"):
        assert one[name].interval().high - one[name].interval().low > 0.02
        assert (one[name] - other[name]).interval() == Interval(0, 0, 0)


def test_what_a_scene_does_to_both_methods_cancels_in_their_difference() -> None:
    """A method that gets a tenth of the rest right, too: the gain is certain, however different the scenes are."""
    counts = class_counts(0)
    better = counts.clone()
    better[:, 0] += (better[:, 1] - better[:, 0]) // 10
    one, other = (segmentation_estimates(found, Bootstrap())["pixel_accuracy"] for found in (better, counts))
    found, alone = (one - other).interval(), one.interval()
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < (alone.high - alone.low) / 3


def test_the_bias_of_replicas_does_not_move_an_interval() -> None:
    replicas = torch.linspace(-1, 1, 101).double()
    assert interval(5.0, replicas + 3, 0.9) == pytest.approx((4.1, 5.9))
    assert interval(5.0, torch.full((10,), 7.0).double(), 0.9) == (5.0, 5.0)
    assert quantiles(replicas + 3, 0.9) == pytest.approx((2.1, 3.9))


def test_intervals_end_at_the_bounds_of_the_metric() -> None:
    """A value near the end of its range: without bounds, the interval about it would cross that end."""
    replicas = torch.tensor([0.5, *[1.0] * 9]).double()
    beyond = interval(0.98, replicas, 0.95)
    assert beyond[1] > 1
    assert interval(0.98, replicas, 0.95, (-1, 1)) == (beyond[0], 1.0)
    assert interval(1 + 1e-9, replicas, 0.95, (-1, 1))[1] == 1 + 1e-9  # holds its value, however it was rounded
    assert interval(0.01, -replicas, 0.95, (0, math.inf))[0] == 0.0
    unequal = estimate({"a": {"snow": (8.0, 8)}, "b": {"snow": (0.2, 1)}}, "flat", Bootstrap())
    assert unequal.interval().high > 1  # flat: the replicas are low on average
    assert unequal.interval((-1, 1)).high == 1.0


def test_each_kind_of_metric_has_its_range() -> None:
    subjects = load_protocol(SubjectProtocol, "dreambooth/subject-macro-v1").metrics
    maps = load_protocol(MapProtocol, "s2i/csail-v1").metrics
    cosine, distance, share = (-1, 1), (0, math.inf), (0, 1)
    assert {subjects[name].bounds for name in subjects if name.startswith(("DINO", "CLIP"))} == {cosine}
    assert {subjects[name].bounds for name in subjects if name.startswith("LPIPS")} == {distance}
    assert (maps["FID"].bounds, maps["KID"].bounds) == (distance, (-math.inf, math.inf))
    assert {maps[name].bounds for name in maps if name not in ("FID", "KID")} == {share}


@pytest.mark.parametrize("size", [2, 3, 4, 8, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_t_intervals_agree_with_scipys_t_test(size: int, level: float) -> None:
    values = torch.randn(size, generator=generator(0, "test/t"), dtype=torch.float64).tolist()
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    found = t_interval(values, level)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_a_t_interval_of_published_results() -> None:
    """The published value is from a quantile by numerical integration, to 1e-6."""
    found = t_interval([0.7 - 0.5, 0.5 - 0.45, 0.65 - 0.5])
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.13333333333333333, -0.05639581834935309, 0.32306248501601975), rel=2e-6
    )


def test_t_intervals_over_three_subjects_cover_as_often_as_their_level() -> None:
    """Subjects differ in how much better a method is, and each of ten prompts adds noise of its own."""
    truth, times, rng = 0.05, 2000, generator(0, "test/coverage")
    subjects = truth + 0.03 * torch.randn(times, 3, generator=rng)
    means = (subjects[:, :, None] + 0.1 * torch.randn(times, 3, 10, generator=rng)).mean(dim=2).tolist()
    found = [t_interval(one) for one in means]
    covered = sum(one.low <= truth <= one.high for one in found) / times
    assert 0.93 <= covered <= 0.97


def test_the_t_interval_of_one_value_is_unbounded() -> None:
    assert t_interval([0.2]) == Interval(0.2, -math.inf, math.inf)


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = torch.rand(12, generator=generator(0, "test/values")).double()
    found = jackknife_interval(values, lambda some: float(some.mean()), groups=12)
    expected = t_interval(values.tolist())
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), rel=1e-9
    )


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(("trials", "lowest"), [(40, 0.85), pytest.param(500, 0.93, marks=pytest.mark.slow)])
def test_intervals_of_distances_have_their_level_where_a_bootstraps_are_too_wide(
    distance: Distance, trials: int, lowest: float
) -> None:
    """Sets of 40 images of 32 features, with another mean and spread than the reference: the truth is the mean over
    sets of their size, because FID depends on it."""
    rng = generator(0, "test/distances")
    reference, count = torch.randn(200, 32, generator=rng), 40
    sets = [torch.randn(count, 32, generator=rng) * 1.3 + 0.4 for _ in range(6 * trials)]
    values = torch.tensor([distance(reference, one) for one in sets], dtype=torch.float64)
    truth, spread = float(values.mean()), float(values.std())
    of_jackknife = [jackknife_interval(one, lambda some: distance(reference, some), 20) for one in sets[:trials]]
    covered = sum(one.low <= truth <= one.high for one in of_jackknife) / trials
    assert lowest <= covered <= 1 if trials < 100 else lowest <= covered <= 0.98
    half = sum(one.high - one.low for one in of_jackknife) / trials / 2
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 19) * spread, rel=0.3)
    samples = image_samples(count, Bootstrap(replicates=40))
    widths = []
    for one in sets[:12]:
        replicas = torch.tensor([distance(reference, one[k]) for k in samples], dtype=torch.float64)
        low, high = interval(float(replicas.mean()), replicas, 0.95)
        widths.append((high - low) / 2)
    assert sum(widths) / len(widths) > 1.4 * 1.96 * spread

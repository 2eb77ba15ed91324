"""Laws of the miniature paper's intervals: they cover what they say, and what all have in common drops out."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from miniature_paper.estimates import map_estimates, mean_estimate, over_subjects, t_quantile

from ether_diffusion.evaluation.protocols import Bootstrap
from ether_diffusion.metrics.segmentation import scores
from ether_diffusion.randomness import generator


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 29])
def test_quantiles_are_scipys(degrees: int) -> None:
    for level in (0.5, 0.9, 0.95, 0.99):
        assert t_quantile(level, degrees) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, degrees), rel=1e-5)


def test_intervals_over_three_subjects_cover_as_much_as_they_say() -> None:
    """Subjects differ in how much better a method is, and each of ten prompts adds noise of its own."""
    truth, times, draws = 0.05, 2000, generator(0, "test/coverage")
    subjects = truth + 0.03 * torch.randn(times, 3, generator=draws)
    means = (subjects[:, :, None] + 0.1 * torch.randn(times, 3, 10, generator=draws)).mean(dim=2).tolist()
    none = dict.fromkeys("abc", 0.0)
    found = [over_subjects(dict(zip("abc", one, strict=True)), none) for one in means]
    covered = sum(one.low <= truth <= one.high for one in found) / times
    assert 0.93 <= covered <= 0.97


def test_one_subject_says_nothing_of_others() -> None:
    found = over_subjects({"a": 0.7}, {"a": 0.5})
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (-math.inf, math.inf)


def drawn(seed: int, scenes: int = 40, classes: int = 5) -> torch.Tensor:
    """Counts of scenes of very different difficulty."""
    draws = generator(seed, "test/scenes")
    true = torch.randint(0, 200, (scenes, classes), generator=draws)
    right = (true * torch.rand(scenes, 1, generator=draws)).long()
    return torch.stack([right, true, true], dim=1)


def test_equal_images_differ_by_nothing() -> None:
    one, other = (map_estimates(drawn(0), Bootstrap()) for _ in range(2))
    for name in ("miou", "pixel_accuracy"):
        assert one[name].interval().high - one[name].interval().low > 0.02
        found = (one[name] - other[name]).interval()
        assert (found.value, found.low, found.high) == (0, 0, 0)


def test_what_scenes_do_to_both_drops_out_of_a_difference() -> None:
    """A method that gets a tenth of the rest right, too: the gain is sure, however unlike the scenes are."""
    counts = drawn(0)
    better = counts.clone()
    better[:, 0] += (better[:, 1] - better[:, 0]) // 10
    one, other = (map_estimates(found, Bootstrap())["pixel_accuracy"] for found in (better, counts))
    found, alone = (one - other).interval(), one.interval()
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < (alone.high - alone.low) / 3


def test_estimates_are_those_of_the_whole_set() -> None:
    counts = drawn(1)
    stated = scores(*counts.sum(dim=0))
    for name, found in map_estimates(counts, Bootstrap(replicates=50)).items():
        assert found.value == stated[name]
        assert len(found.replicas) == 50


def test_seeds_are_averaged() -> None:
    one, other = (map_estimates(drawn(seed), Bootstrap(replicates=9))["miou"] for seed in (0, 1))
    both = mean_estimate([one, other])
    assert both.value == pytest.approx((one.value + other.value) / 2)
    assert torch.allclose(both.replicas, (one.replicas + other.replicas) / 2)

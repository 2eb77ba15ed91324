"""CMMD: against the formula written out, pair by pair; and where it is 0."""

from __future__ import annotations

import math

import pytest
import torch

from ether_diffusion.metrics.cmmd import clip_distance


def features(count: int, shift: float, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def test_it_is_the_formula_of_the_authors_code_pair_by_pair() -> None:
    sets = [[row / row.norm() for row in one.double()] for one in (features(5, 0, 0), features(7, 1, 1))]

    def mean(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        kernels = [math.exp(-float((a - b).square().sum()) / (2 * 10**2)) for a in one for b in other]
        return sum(kernels) / len(kernels)

    real, generated = sets
    expected = 1000 * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))
    assert clip_distance(features(5, 0, 0), features(7, 1, 1)) == pytest.approx(expected, rel=1e-9)


def test_a_set_has_no_distance_to_itself_and_more_to_a_farther_one() -> None:
    one = features(40, 0, 0)
    assert clip_distance(one, one.flip(0)) == pytest.approx(0, abs=1e-9)
    near, far = (clip_distance(one, features(40, shift, 1)) for shift in (0.2, 1))
    assert 0 < near < far


def test_lengths_of_features_do_not_count() -> None:
    one, other = features(9, 0, 0), features(9, 1, 1)
    assert clip_distance(3 * one, other / 2) == pytest.approx(clip_distance(one, other), rel=1e-6)

"""Randomness is a function of (seed, stream, index): the same numbers everywhere, unrelated for other arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

from ether_diffusion.randomness import derive_seed, generator, permutation


def numbers(seed: int, stream: str, index: int = 0, size: int = 10_000) -> torch.Tensor:
    return torch.randn(size, generator=generator(seed, stream, index))


def test_the_same_arguments_give_the_same_numbers_whatever_came_before():
    first = numbers(3, "noise", 7)
    torch.manual_seed(0)
    torch.randn(5)
    numbers(3, "noise", 8)
    assert torch.equal(numbers(3, "noise", 7), first)


def test_the_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    numbers(0, "noise")
    permutation(0, "noise", 0, 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_seeds_streams_and_indices_are_uncorrelated():
    samples = [numbers(seed, stream, i) for seed in (0, 1) for stream in ("noise", "timestep") for i in (0, 1, 2)]
    for a, b in itertools.combinations(samples, 2):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(correlation) < 0.05  # five standard deviations for 10,000 independent numbers


def test_first_numbers_of_neighbouring_indices_are_uncorrelated():
    first = torch.stack([numbers(0, "noise", i, size=1) for i in range(5000)]).flatten()
    assert abs(first.mean()) < 0.07
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.07


def test_no_two_of_ten_thousand_seeds_are_equal():
    seeds = {derive_seed(seed, stream, i) for seed in range(10) for stream in ("a", "b") for i in range(500)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_arguments_do_not_run_into_each_other():
    assert derive_seed(1, "a", 11) != derive_seed(1, "a/1", 1) != derive_seed(11, "a", 1)


@pytest.mark.parametrize("size", [0, 1, 2, 17])
def test_a_permutation_holds_every_index_once(size):
    assert sorted(permutation(5, "instance", 2, size)) == list(range(size))


def test_permutations_differ_between_epochs_seeds_and_streams():
    orders = [permutation(s, stream, e, 30) for s in (0, 1) for stream in ("instance", "class") for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 8


def test_every_place_in_a_permutation_is_equally_likely():
    counts = torch.zeros(5, 5)
    for epoch in range(2000):
        counts[torch.arange(5), permutation(0, "instance", epoch, 5)] += 1
    assert ((counts - 400).abs() < 90).all()  # five standard deviations


def test_golden_numbers():
    """Pinned: a change here changes every result ever made with a seed."""
    assert derive_seed(0, "noise") == GOLDEN_SEEDS[0]
    assert derive_seed(42, "timestep", 1234567) == GOLDEN_SEEDS[1]
    assert permutation(0, "instance", 0, 8) == GOLDEN_ORDER
    assert torch.allclose(numbers(0, "noise", 0, size=3), torch.tensor(GOLDEN_NUMBERS), atol=1e-6)


GOLDEN_SEEDS = (5858681329433569406, 2628883057072176369)
GOLDEN_ORDER = [3, 7, 1, 4, 6, 5, 0, 2]
GOLDEN_NUMBERS = [1.360296, -1.314396, -1.056104]

"""The order of samples: every photo equally often, every group of one shape, subjects in rounds."""

from __future__ import annotations

from collections import Counter

import pytest

from ether_diffusion.data.sample_order import SampleOrder, samples_per_epoch
from ether_diffusion.randomness import permutation


@pytest.mark.parametrize("group", [1, 2, 4])
def test_with_one_shape_an_epoch_is_one_permutation(group):
    order = SampleOrder([["square"] * 5], seed=3, group=group)
    shown = [order[i].photo for i in range(40)]
    assert shown == [photo for epoch in range(8) for photo in permutation(3, "instance", epoch, 5)]
    assert [order[i].number for i in range(40)] == list(range(40))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_share_a_shape_and_a_cycle_shows_each_photo_equally_often(group):
    shapes = ["wide", "tall", "wide", "square", "wide"]
    order = SampleOrder([shapes], seed=0, group=group)
    cycle = group * len(shapes)
    orders = []
    for start in range(0, 10 * cycle, cycle):
        shown = [order[i].photo for i in range(start, start + cycle)]
        assert Counter(shown) == dict.fromkeys(range(5), group)
        for first in range(0, cycle, group):
            assert len({shapes[photo] for photo in shown[first : first + group]}) == 1
        orders.append(tuple(shown))
    assert len(set(orders)) > 5


@pytest.mark.parametrize("group", [1, 3])
def test_subjects_alternate_in_rounds(group):
    order = SampleOrder([["a"] * 3, ["b", "c"], ["a"]], seed=0, group=group)
    assert len(order) == samples_per_epoch([3, 2, 1]) == 9
    rounds = []
    for start in range(0, 30 * group, 3 * group):
        units = [[order[i] for i in range(u, u + group)] for u in range(start, start + 3 * group, group)]
        assert all(len({shown.subject for shown in unit}) == 1 for unit in units)
        rounds.append(tuple(unit[0].subject for unit in units))
        assert sorted(rounds[-1]) == [0, 1, 2]
    assert len(set(rounds)) > 1
    for subject in range(3):
        own = [order[i] for i in range(30 * group) if order[i].subject == subject]
        assert [shown.number for shown in own] == list(range(10 * group))
    first = Counter(order[i].photo for i in range(9 * group) if order[i].subject == 0)
    assert first == dict.fromkeys(range(3), group)

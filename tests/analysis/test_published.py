"""Published numbers stand in one file: configs that plot them as references agree with it."""

from __future__ import annotations

import pytest

from ether_diffusion.analysis.published import MIOU_BY_RATE, MIOU_RATES, TABLE_2
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.config import load_config


def test_references_of_rates_are_those_of_fig_5() -> None:
    part = load_config(GridConfig, "benchmark/rates").controllable
    assert part is not None
    (reference,) = part.grid.references
    assert tuple(map(float, reference.at)) == MIOU_RATES
    for method, values in reference.values.items():
        assert [100 * value for value in values] == pytest.approx(MIOU_BY_RATE[method])


def test_references_of_sides_are_those_of_table_2() -> None:
    part = load_config(GridConfig, "benchmark/sides").dreambooth
    assert part is not None
    assert {reference.metric for reference in part.grid.references} == {"DINO", "CLIP-I"}
    for reference in part.grid.references:
        expected = {"in": TABLE_2["ether_plus_one_sided"], "both": TABLE_2["ether_plus"]}
        found = dict(zip(reference.at, reference.values["ether_plus"], strict=True))
        assert found == {side: numbers[reference.metric] for side, numbers in expected.items()}

"""Laws of the miniature paper: its criteria agree with the paper's own numbers, and say no to others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from ether_diffusion.analysis.paper import DISTANCE_RATES, DISTANCES, ENERGY_CHANGES
from ether_diffusion.evaluation.grid import Spread, Summary
from ether_diffusion.evaluation.grid_config import Cell
from ether_diffusion.evaluation.paper_claims import above, all_of, claims, within
from ether_diffusion.evaluation.paper_config import RATE
from ether_diffusion.evaluation.paper_findings import Chosen, Difference, Findings, Scores, fidelity
from ether_diffusion.evaluation.paper_numbers import MIOU_BY_RATE, RATES, STYLES, TABLE_2, TABLE_2_REAL, TABLE_3
from ether_diffusion.evaluation.results import MetricRecord, Results

OURS = {"DINO": "backbone"}
SUBJECTS = {
    **TABLE_2,
    "ether_plus_one_sided": {**TABLE_2["ether_plus_one_sided"], "CLIP-T": 0.245},  # which the paper leaves out
    "base": {"DINO": 0.4, "CLIP-I": 0.6, "CLIP-T": 0.26},
}
PERTURBED = {"base": {0.0: 0.6}, "oft": {0.5: 0.6, 14.0: 0.1}, "ether": {2.0: 0.58}, "ether_plus": {1.4: 0.57}}


def table(paper: Mapping[str, Mapping[str, float]], ceilings: Mapping[str, float], noise: float = 0.0) -> Scores:
    """The paper's table as if it had been found here, every difference within `noise`."""
    results, differences = {}, {}
    for method, found in paper.items():
        metrics = {
            OURS.get(name, name): MetricRecord(value=value, low=value, high=value, higher_is_better=name != "FID")
            for name, value in found.items()
        }
        results[method] = Results(
            protocol="p", protocol_digest="", run={}, judges={}, versions={}, counts={}, metrics=metrics,
            ceilings=dict(ceilings),
        )  # fmt: skip
    for one, other in itertools.permutations(results, 2):
        for name in results[one].metrics.keys() & results[other].metrics.keys():
            value = results[one].metrics[name].value - results[other].metrics[name].value
            differences[name, one, other] = Difference(value, value - noise, value + noise)
    return Scores(results, dict.fromkeys(paper, 1), differences)


def the_papers(noise: float = 0.0) -> Findings:
    grid = [
        Summary(method, ((RATE, rate),), None, 1, 0, 0, {"mIoU": Spread(value, value, value)})
        for method, curve in MIOU_BY_RATE.items()
        for rate, value in zip(RATES, curve, strict=True)
    ]
    chosen = {name: Chosen(Cell(name, ((RATE, 1e-3),), 0), 1e-3, 27, at_edge=False) for name in ("oft", "ether_plus")}
    early = {"oft": 10.0, "ether_plus": 26.0}
    grid += [
        Summary(name, ((RATE, 1e-3),), 40, 1, 0, 0, {"mIoU": Spread(v, v, v)}) for name, v in early.items()
    ]  # fmt: skip
    keys = {title: name for name, title in STYLES.items()}
    return Findings(
        subjects=table(SUBJECTS, {"backbone": TABLE_2_REAL["DINO"]}, noise),
        maps=table(TABLE_3, {}, noise),
        grids={"dreambooth": [], "controllable": grid},
        chosen={"dreambooth": {}, "controllable": chosen},
        distances={
            keys[title]: {rate: {"transform": value} for rate, value in zip(DISTANCE_RATES, found, strict=True)}
            for title, found in DISTANCES.items()
        },
        energies={keys[title]: {0: 0.0, 1400: change} for title, change in ENERGY_CHANGES.items()},
        perturbed=PERTURBED,
    )


def test_the_papers_own_numbers_fulfil_every_criterion() -> None:
    verdicts = {claim.paper: claim.verdict for claim in claims(the_papers())}
    assert {paper for paper, verdict in verdicts.items() if verdict != "holds"} == set()


def test_noise_leaves_the_tables_undecided_and_the_figures_as_they_are() -> None:
    for claim in claims(the_papers(noise=100.0)):
        assert claim.verdict == ("undecided" if claim.where.startswith("Table") else "holds"), claim.paper


def test_numbers_the_other_way_round_are_told_as_such() -> None:
    found = the_papers()
    swap = {"oft": "ether_plus", "ether_plus": "oft", "naive": "ether", "ether": "naive"}
    turned = replace(
        found,
        subjects=table({swap.get(k, k): v for k, v in SUBJECTS.items()}, {"backbone": 0.703}),
        maps=table({swap.get(k, k): v for k, v in TABLE_3.items()}, {}),
        distances={swap[k]: v for k, v in found.distances.items()},
        energies={swap[k]: v for k, v in found.energies.items()},
        perturbed={**PERTURBED, "oft": {14.0: 0.6}, "ether": {2.0: 0.1}},
        grids={"controllable": [replace(one, method=swap[one.method]) for one in found.grids["controllable"]]},
    )
    failed = {claim.where for claim in claims(turned) if claim.verdict == "does not hold"}
    assert failed == {"Table 2", "Table 3", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Fig. 7"}


def test_what_is_not_there_is_not_measured() -> None:
    nothing = Findings(Scores({}, {}), Scores({}, {}), {"controllable": []}, {"controllable": {}}, {}, {}, {})
    assert {claim.verdict for claim in claims(nothing)} == {"not measured"}


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "holds"), (-0.2, -0.1, "does not hold"), (-0.1, 0.1, "undecided")]
)
def test_a_difference_is_decided_by_its_interval(low: float, high: float, verdict: str) -> None:
    difference = Difference((low + high) / 2, low, high)
    assert above(difference) == verdict
    assert within(difference, 1.0) == "holds"
    assert within(difference, 0.05) == ("undecided" if verdict == "undecided" else "does not hold")
    assert above(None) == within(None, 1.0) == above(difference, math.nan) == "not measured"


def test_a_part_that_fails_outweighs_what_is_not_known() -> None:
    assert all_of(["holds", "undecided", "does not hold", "not measured"]) == "does not hold"
    assert all_of(["holds", "undecided"]) == "undecided"
    assert all_of([]) == "not measured"


def test_fidelity_asks_for_both() -> None:
    assert fidelity(0.7, 0.7, 0.3, 0.3) == 1.0
    assert fidelity(0.0, 0.7, 0.3, 0.3) == fidelity(0.7, 0.7, -0.1, 0.3) == 0.0
    assert fidelity(0.35, 0.7, 0.3, 0.3) == pytest.approx(2 / 3)
    assert fidelity(0.35, 0.7, 0.15, 0.3) == pytest.approx(0.5)

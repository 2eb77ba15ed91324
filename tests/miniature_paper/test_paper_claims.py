"""Laws of the miniature paper: its criteria accept the paper's own numbers, and reject others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ether_diffusion.analysis.published import MIOU_RATES, TABLE_3, TABLE_3_REAL
from ether_diffusion.evaluation.intervals import Estimate, Interval
from miniature_paper.best_rates import fidelity
from miniature_paper.figure_claims import claims
from miniature_paper.gains import KEEPS, MapTraining, end_gains, has, more
from miniature_paper.interval_verdicts import Verdict, above, all_of, within
from miniature_paper.paper_findings import Findings, Scores
from support.paper_findings import PERTURBED, SUBJECTS, estimate, table, the_papers, trainings


def test_the_papers_own_numbers_fulfil_every_criterion() -> None:
    verdicts = {claim.paper: claim.verdict for claim in claims(the_papers())}
    assert {paper for paper, verdict in verdicts.items() if verdict != "holds"} == set()


def test_noise_leaves_claims_with_intervals_undecided() -> None:
    without = ("Fig. 3", "Fig. 4", "Fig. 7")
    for claim in claims(the_papers(noise=100.0)):
        assert claim.verdict == ("holds" if claim.where in without else "undecided"), claim.paper


TURNED: list[tuple[str, Verdict]] = [
    ("ETHER+ has the highest subject fidelity", "does not hold"),
    ("ETHER has the lowest subject fidelity", "does not hold"),
    ("One-sided ETHER+ is between", "does not hold"),
    ("Orthogonality does not matter: Naive does as well as OFT (DINO", "does not hold"),
    ("ETHER+ follows maps best", "does not hold"),
    ("Every adapter adds much", "does not hold"),
    ("ETHER does as well as OFT", "does not hold"),
    ("Re-fitting magnitudes adds little", "does not hold"),
    ("Orthogonality does not matter: Naive does as well as OFT (mIoU", "does not hold"),
    ("Random transforms at their largest distance", "does not hold"),
    ("At every rate ETHER's transforms are at distance 2", "does not hold"),
    ("The distances of OFT and Naive grow with the rate", "does not hold"),
    ("ETHER and ETHER+ do well at more rates", "does not hold"),
    ("At the highest rate ETHER and ETHER+ still", "does not hold"),
    ("ETHER+ is near its best after the first", "does not hold"),
    ("OFT and ETHER do not change the hyperspherical energy", "does not hold"),
    ("ETHER+ changes the energy most", "does not hold"),
]


def test_swapped_numbers_do_not_hold() -> None:
    found = the_papers()
    swap = {"oft": "ether_plus", "ether_plus": "oft", "naive": "ether", "ether": "naive"}
    weak = {"oft_magnitude": {**TABLE_3["oft_magnitude"], "mIoU": 10.0}}  # adds next to nothing to the encoder
    turned = replace(
        found,
        subjects=table({swap.get(k, k): v for k, v in SUBJECTS.items()}, {"backbone": 0.703}),
        maps=table({swap.get(k, k): v for k, v in {**TABLE_3, **weak}.items()}, TABLE_3_REAL),
        distances={swap[k]: v for k, v in found.distances.items()},
        energies={swap[k]: v for k, v in found.energies.items()},
        perturbed={**PERTURBED, "oft": {14.0: 0.6}, "ether": {2.0: 0.1}},
        trainings={swap.get(k, k): v for k, v in found.trainings.items()},
    )
    found = [(claim.paper, claim.verdict) for claim in claims(turned)]
    assert len(found) == len(TURNED)
    for (paper, verdict), (start, expected) in zip(found, TURNED, strict=True):
        assert paper.startswith(start)
        assert verdict == expected, paper


def test_missing_numbers_are_not_measured() -> None:
    nothing = Findings(Scores({}, {}), Scores({}, {}), {"controllable": []}, {"controllable": {}}, {}, {}, {})
    assert {claim.verdict for claim in claims(nothing)} == {"not measured"}


def verdict_of(findings: Findings, start: str) -> Verdict:
    return next(claim.verdict for claim in claims(findings) if claim.paper.startswith(start))


def test_much_is_a_third_of_the_largest_possible_gain() -> None:
    """A certain but small difference is not much."""
    for value, verdict in ((8.3, "does not hold"), (8.2 + 33.8 / 3 + 0.1, "holds")):
        maps = table({**TABLE_3, "naive": {**TABLE_3["naive"], "mIoU": value}}, TABLE_3_REAL)
        assert verdict_of(replace(the_papers(), maps=maps), "Every adapter adds much") == verdict


def test_shares_are_of_the_gain_and_not_of_what_comes_without_maps() -> None:
    """20 of 27 would be 74% of mIoU; above an encoder alone at 16 it is 36% of what was gained."""
    best = MapTraining(1e-3, False, {None: estimate(27)})
    other = MapTraining(1e-2, False, {None: estimate(20)})

    def keeps(training: MapTraining, alone: Estimate) -> Verdict:
        return has(training, end_gains(training, [best, other], alone), KEEPS)

    assert keeps(other, estimate(0.0)) == "does not hold"
    assert keeps(other, estimate(-8.5)) == "holds"
    assert keeps(best, estimate(16.0)) == "holds"
    assert keeps(best, estimate(28.0)) == "does not hold"


def test_a_diverged_training_keeps_no_gain() -> None:
    found = trainings()
    found["ether_plus"][-1] = MapTraining(0.1, True, {})
    findings = replace(the_papers(), trainings=found)
    assert verdict_of(findings, "At the highest rate") == "does not hold"
    assert verdict_of(findings, "ETHER+ is near its best") == "does not hold"
    assert "ETHER+ diverged at 0.1" in next(c.found for c in claims(findings) if c.paper.startswith("At the highest"))
    found = trainings()
    found["naive"][-1] = MapTraining(0.1, True, {})
    assert verdict_of(replace(the_papers(), trainings=found), "At the highest rate") == "holds"


def test_rates_from_a_decade_below_the_best_are_judged() -> None:
    """A slow training at 1e-5 does not count, one at 1e-4 does."""
    for rate, verdict in ((1e-5, "holds"), (1e-4, "does not hold"), (1e-2, "does not hold")):
        found = trainings()
        place = MIOU_RATES.index(rate)
        found["ether_plus"][place] = MapTraining(rate, False, {20: estimate(9.0), None: estimate(25.0)})
        assert verdict_of(replace(the_papers(), trainings=found), "ETHER+ is near its best") == verdict


def test_the_step_and_its_share_are_those_of_the_run() -> None:
    criterion = next(claim.criterion for claim in claims(the_papers()) if claim.where == "Fig. 6")
    assert "after step 20 of 200 (10%)" in criterion
    assert "0.0001" in criterion


def test_undecided_rates_leave_a_count_open() -> None:
    yes, no, open_ = "holds", "does not hold", "undecided"
    assert more([[yes, yes, yes]], [[yes, no, open_]]) == "holds"
    assert more([[yes, yes, no]], [[yes, no, open_]]) == "undecided"
    assert more([[yes, open_, no]], [[yes, yes, no]]) == "does not hold"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "holds"), (-0.2, -0.1, "does not hold"), (-0.1, 0.1, "undecided")]
)
def test_a_difference_is_decided_by_its_interval(low: float, high: float, verdict: str) -> None:
    difference = Interval((low + high) / 2, low, high)
    assert above(difference) == verdict
    assert within(difference, 1.0) == "holds"
    assert within(difference, 0.05) == ("undecided" if verdict == "undecided" else "does not hold")
    assert above(None) == within(None, 1.0) == above(difference, math.nan) == "not measured"


def test_a_failed_part_outweighs_an_unknown_one() -> None:
    assert all_of(["holds", "undecided", "does not hold", "not measured"]) == "does not hold"
    assert all_of(["holds", "undecided"]) == "undecided"
    assert all_of([]) == "not measured"


def test_fidelity_needs_subject_and_prompt() -> None:
    assert fidelity(0.7, 0.7, 0.3, 0.3) == 1.0
    assert fidelity(0.0, 0.7, 0.3, 0.3) == fidelity(0.7, 0.7, -0.1, 0.3) == 0.0
    assert fidelity(0.35, 0.7, 0.3, 0.3) == pytest.approx(2 / 3)
    assert fidelity(0.35, 0.7, 0.15, 0.3) == pytest.approx(0.5)

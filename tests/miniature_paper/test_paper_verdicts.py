"""Verdicts from readings: Holm, two looks, intersection-union, errors and power by simulation, and the CSV."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from ether_diffusion.errors import UserError
from miniature_paper.decisions import LEVEL, LOOKS, EmpiricalClaim, Part, decide, holm, table
from miniature_paper.paper_claims import ADAPTERS, CLAIMS, MAPS, ROW, SUBJECTS
from miniature_paper.readings import Difference, Reading, Readings, mean_difference

ROOT = Path(__file__).resolve().parents[2]
UNITS = [f"unit {k}" for k in range(6)]


def claim(name: str, *differences: Callable[[Readings], Difference | None], effect: float = 0.1) -> EmpiricalClaim:
    parts = tuple(Part(f"{name} {k}", one, 0.0, effect) for k, one in enumerate(differences))
    return EmpiricalClaim(name, name, f"{effect}", parts)


@dataclass(frozen=True)
class Looked:
    """Stands for readings: differences are looked up by the number of seeds."""

    found: dict[int, list[Difference]]
    seeds: int = 6

    def only(self, seeds: int) -> Looked:
        return Looked(self.found, seeds)

    def part(self, k: int) -> Difference | None:
        return self.found[self.seeds][k] if self.seeds in self.found else None


def simulated(truth: np.ndarray, rng: np.random.Generator, between: float = 0.04, within: float = 0.05) -> Looked:
    """Differences of true sizes over six units, after three and after six seeds; earlier seeds are part of later."""
    units = truth[:, None] + rng.normal(0, between, (len(truth), 6))
    seeds = rng.normal(0, within * 2**0.5, (len(truth), 6, 6))
    found = {}
    for count in (2, 3, 5, 6):
        values = units + seeds[:, :, :count].mean(axis=2)
        errors = values.std(axis=1, ddof=1) / 6**0.5
        found[count] = [Difference(v, e, 5, 12 * count) for v, e in zip(values.mean(axis=1), errors, strict=True)]
    return Looked(found)


def claims_of(sizes: list[int], effect: float = 0.1) -> list[EmpiricalClaim]:
    """A claim for each size, which is the number of its parts."""
    first = np.cumsum([0, *sizes])
    return [
        claim(f"claim {n}", *(lambda r, k=k: r.part(k) for k in range(first[n], first[n + 1])), effect=effect)  # pyright: ignore
        for n in range(len(sizes))
    ]


@pytest.mark.parametrize("trials", [60, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["wrong", "true", "mixed"])
def test_at_most_one_family_in_twenty_has_a_false_verdict(trials: int, kind: str) -> None:
    """wrong: every claim is just wrong (no difference); true: just true with the effect of interest; mixed: both."""
    sizes = [1, 1, 2, 2, 6, 6, 3, 1, 2, 4, 1]
    claims, rng = claims_of(sizes), np.random.default_rng(0)
    false = 0
    for _ in range(trials):
        truth = np.concatenate(
            [
                np.full(size, 0.0 if kind == "wrong" or (kind == "mixed" and k % 2) else 0.1)
                for k, size in enumerate(sizes)
            ]
        )
        decisions = decide(claims, simulated(truth, rng))  # pyright: ignore[reportArgumentType]
        worst = ["holds" if truth[sum(sizes[:k])] == 0 else "does not hold" for k in range(len(sizes))]
        false += any(one.verdict == bad for one, bad in zip(decisions, worst, strict=True))
    assert false / trials <= LEVEL + 3 * (LEVEL / trials) ** 0.5 if trials < 100 else false / trials <= LEVEL


@pytest.mark.parametrize("trials", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_power_for_effects_of_interest(trials: int) -> None:
    """docs/analyses.md states these: a single difference among eleven claims, others undecided."""
    claims, rng = claims_of([1] * 11, effect=0.1), np.random.default_rng(1)
    power = {}
    for size in (0.1, 0.2, 0.3):
        truth = np.array([size, *[0.05] * 10])
        found = [decide(claims, simulated(truth, rng))[0].verdict for _ in range(trials)]  # pyright: ignore
        power[size] = found.count("holds") / trials
    assert power[0.1] < power[0.2] < power[0.3]
    assert power[0.3] > 0.85


def test_holm_steps_down_and_counts_what_is_not_there() -> None:
    p = {"a": 0.009, "b": 0.012, "c": 0.04}
    assert holm(p, 0.05, 3) == {"a", "b", "c"}
    assert holm(p, 0.05, 5) == {"a", "b"}
    assert holm(p, 0.05, 6) == set()


def test_a_claim_is_decided_at_its_first_look_and_shares_add_up() -> None:
    assert sum(LOOKS.values()) == pytest.approx(1)
    first = {seeds: [Difference(0.5, 0.02, 5, 12 * seeds)] for seeds in (2, 3)}
    later = {seeds: [Difference(-0.5, 0.02, 5, 12 * seeds)] for seeds in (5, 6)}
    only = claims_of([1])
    found = decide(only, Looked(first | later))[0]  # pyright: ignore[reportArgumentType]
    assert (found.verdict, found.seeds, found.difference and found.difference.trainings) == ("holds", 3, 36)
    unclear = {seeds: [Difference(0.05, 0.5, 5, 12 * seeds)] for seeds in (2, 3)}
    found = decide(only, Looked(unclear | later))[0]  # pyright: ignore[reportArgumentType]
    assert (found.verdict, found.seeds) == ("does not hold", 6)


def test_all_parts_must_hold_and_one_refutes() -> None:
    up, down = Difference(0.5, 0.01, 5, 36), Difference(-0.5, 0.01, 5, 36)
    before = [Difference(0.5, 0.01, 5, 24)] * 2
    assert decide(claims_of([2]), Looked({2: before, 3: [up, up]}))[0].verdict == "holds"  # pyright: ignore
    found = decide(claims_of([2]), Looked({2: before, 3: [up, down]}))[0]  # pyright: ignore[reportArgumentType]
    assert found.verdict == "does not hold"
    assert found.deciding is not None
    assert found.deciding.title == "claim 0 1"
    assert "36 trainings, 3 seeds" in found.found


def readings(seeds: int, effect: float = 0.2, noise: float = 0.01) -> Readings:
    """Every table of the claims: ETHER+ is the best by `effect`, ETHER the worst."""
    rng, found = np.random.default_rng(0), []
    order = dict.fromkeys(ROW, 0.0) | {"ether_plus": effect, "ether": -effect, "ether_plus_one_sided": -effect / 3}
    for seed in range(seeds):
        for unit in UNITS:
            for method in ROW:
                for metric, sign in (("backbone", 1), ("CLIP-T", -1)):
                    found.append(
                        Reading(SUBJECTS, method, unit, seed, metric, sign * order[method] + rng.normal(0, noise))
                    )
            for method in ("none", "lora_64", *ADAPTERS):
                level = {"none": 0.2, "lora_64": 0.25, "ether_plus": 0.28}.get(method, 0.24)
                for metric in ("mIoU", "accuracy", "mIoU at the highest rate", "mIoU after a tenth of the steps"):
                    low = 0.1 if metric.endswith("rate") and method in ("oft", "naive") else level
                    found.append(Reading(MAPS, method, unit, seed, metric, low + rng.normal(0, noise / 5)))
    return Readings(found)


def test_the_papers_claims_are_decided_from_readings() -> None:
    verdicts = {one.claim.name: one.verdict for one in decide(CLAIMS, readings(6))}
    assert set(verdicts.values()) == {"holds"}
    worse = {one.claim.name: one.verdict for one in decide(CLAIMS, readings(6, effect=-0.2))}
    assert worse["most like the subject"] == worse["least like, most prompted"] == "does not hold"
    assert {one.verdict for one in decide(CLAIMS, Readings([]))} == {"not measured"}


def test_differences_are_students_over_units_and_count_trainings() -> None:
    found = readings(3)
    values = {(r.unit, r.seed, r.method): r.value for r in found.readings if r.metric == "backbone"}
    means = [np.mean([values[u, s, "oft"] - values[u, s, "lora"] for s in range(3)]) for u in UNITS]
    difference = found.difference(SUBJECTS, "backbone", "oft", "lora")
    assert difference is not None
    expected: Any = scipy.stats.ttest_1samp(means, 0)
    assert difference.above(0) == pytest.approx(float(scipy.stats.t.sf(expected.statistic, 5)))
    low, high = expected.confidence_interval()
    assert (difference.interval().low, difference.interval().high) == pytest.approx((low, high))
    assert difference.trainings == 36
    maps = found.difference(MAPS, "mIoU", "oft", "naive")
    assert maps is not None
    assert maps.trainings == 6


@pytest.mark.parametrize(("unit", "seed", "rest"), [(1, 0.0, 0.3), (0.0, 1.0, 0.3), (1, 1, 0.5)])
def test_tests_on_crossed_seeds_and_folds_keep_their_level(unit: float, seed: float, rest: float) -> None:
    rng, rejected, trials = np.random.default_rng(2), 0, 400
    for _ in range(trials):
        values = rng.normal(0, unit, (10, 1)) + rng.normal(0, seed, (1, 6)) + rng.normal(0, rest, (10, 6))
        rejected += mean_difference(values, True, 12).above(0) < 0.05
    assert rejected / trials <= 0.085


def test_a_csv_gives_the_same_verdicts_and_bad_ones_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = readings(3).write(tmp_path / "readings.csv")
    expected = table(decide(CLAIMS, readings(3)))
    monkeypatch.setattr(sys, "argv", ["verdicts.py", str(path)])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "eval/miniature_paper/verdicts.py"), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == expected
    lines = path.read_text().splitlines()
    for damaged, message in (
        (lines[1:], r":1: expected the columns table, method"),
        ([*lines[:3], "a,b,c,x,d,1"], r":4: expected a whole seed"),
        ([*lines, lines[-1]], r"a reading that is there twice"),
    ):
        path.write_text("\n".join(damaged))
        with pytest.raises(UserError, match=message):
            Readings.read(path)

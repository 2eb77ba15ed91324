"""The paper's claims, each decided by numbers of the miniature and a criterion that is stated beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .grid import Summary
from .paper_analyses import NO_CHANGE
from .paper_config import RATE
from .paper_findings import FAITHFULNESS, LIKENESS, MAPS, Difference, Findings, Scores
from .paper_numbers import TITLES

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]

LITTLE = 0.1
"""The share of a gain up to which two methods count as equal."""
KEEPS = 0.85
"""The share of its own best mIoU that a method has at the rates that it does well at."""
SOON = 0.9
"""The share of its last mIoU that a method has where it is near its best."""


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what is found here.

    Attributes:
        where: The table or figure.
        paper: The claim with its numbers.
        criterion: What decides, in words.
        found: The numbers that decided.
    """

    where: str
    paper: str
    criterion: str
    verdict: Verdict
    found: str


def claims(findings: Findings) -> list[Claim]:
    """All of them, in the order of tables and figures."""
    return [
        *_table_2(findings.subjects),
        *_table_3(findings.maps),
        *_figure_3(findings),
        *_figure_4(findings),
        *_figure_5(findings),
        *_figure_6(findings),
        *_figure_7(findings),
    ]


def above(difference: Difference | None, by: float = 0.0) -> Verdict:
    """Whether a difference is larger than `by`: undecided where its interval has both."""
    if difference is None or math.isnan(by):
        return "not measured"
    if difference.low > by:
        return "holds"
    return "does not hold" if difference.high < by else "undecided"


def within(difference: Difference | None, bound: float) -> Verdict:
    """Whether a difference is smaller than a bound, in either direction."""
    if difference is None or math.isnan(bound):
        return "not measured"
    if -bound < difference.low and difference.high < bound:
        return "holds"
    return "does not hold" if difference.low > bound or difference.high < -bound else "undecided"


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """That of several parts, all of which must hold."""
    found = list(verdicts)
    for worst in ("does not hold", "not measured", "undecided"):
        if worst in found:
            return worst
    return "holds" if found else "not measured"


def decided(condition: bool | None) -> Verdict:
    """Of numbers without intervals; None: they are not there."""
    if condition is None:
        return "not measured"
    return "holds" if condition else "does not hold"


def _table_2(table: Scores) -> list[Claim]:
    methods = ("full", "lora", "oft", "naive", "ether", "ether_plus", "ether_plus_one_sided")
    interval = "95% intervals of the difference, over subjects and prompts"
    others = [name for name in methods if name != "ether_plus"]
    rest = [name for name in methods if name != "ether"]
    likeness = _listed(table, LIKENESS, methods)
    real = next((one.ceilings[LIKENESS] for one in table.results.values()), math.nan)
    bound = LITTLE * (real - table.value("base", LIKENESS))
    return [
        Claim(
            "Table 2",
            "ETHER+ is most like the subject (DINO .666; LoRA .660, OFT .652, Naive .648, DreamBooth .644).",
            f"ETHER+ is above each of the other methods in {LIKENESS}; {interval}.",
            all_of(above(table.difference(LIKENESS, "ether_plus", other)) for other in others),
            likeness,
        ),
        Claim(
            "Table 2",
            "ETHER learns the subject least (DINO .567) and follows prompts best (CLIP-T .256).",
            f"ETHER is below each of the other methods in {LIKENESS} and above each in {FAITHFULNESS}; {interval}.",
            all_of(
                [
                    *(above(table.difference(LIKENESS, other, "ether")) for other in rest),
                    *(above(table.difference(FAITHFULNESS, "ether", other)) for other in rest),
                ]
            ),
            _listed(table, FAITHFULNESS, methods),
        ),
        Claim(
            "Table 2",
            "ETHER+ on one side lies between ETHER and ETHER+ (DINO .567 < .618 < .666).",
            f"both differences in {LIKENESS} are above 0; {interval}.",
            all_of(
                [
                    above(table.difference(LIKENESS, "ether_plus_one_sided", "ether")),
                    above(table.difference(LIKENESS, "ether_plus", "ether_plus_one_sided")),
                ]
            ),
            _listed(table, LIKENESS, ("ether", "ether_plus_one_sided", "ether_plus")),
        ),
        Claim(
            "Table 2",
            "Orthogonality does not matter: Naive does as OFT (DINO .648 and .652).",
            f"they differ by less than a tenth of what lies between the untrained base and the photos in {LIKENESS}, "
            f"here {bound:.3f}; {interval}.",
            within(table.difference(LIKENESS, "naive", "oft"), bound),
            _listed(table, LIKENESS, ("naive", "oft")),
        ),
    ]


def _table_3(table: Scores) -> list[Claim]:
    methods = ("oft", "oft_magnitude", "naive", "ether", "ether_plus")
    interval = "95% intervals of the difference, over scenes"
    gain = table.value("oft", MAPS) - table.value("none", MAPS)
    bound = LITTLE * abs(gain)
    values = _listed(table, MAPS, ("none", *methods))
    others = [name for name in methods if name != "ether_plus"]
    tenth = f"a tenth of OFT's gain over the encoder alone, here {bound:.4f}"
    return [
        Claim(
            "Table 3",
            "ETHER+ follows maps best (mIoU 27.3, accuracy 68.1; the next 24.6 and 63.3).",
            f"ETHER+ is above each of the other methods in mIoU and in accuracy; {interval}.",
            all_of(above(table.difference(name, "ether_plus", o)) for name in (MAPS, "accuracy") for o in others),
            f"{values}; accuracy: {_listed(table, 'accuracy', methods)}",
        ),
        Claim(
            "Table 3",
            "Every adapter adds much to the encoder alone (mIoU 8.2 without, 24.3 to 27.3 with).",
            f"each method is above the encoder alone in mIoU; {interval}.",
            all_of(above(table.difference(MAPS, name, "none")) for name in methods),
            values,
        ),
        Claim(
            "Table 3",
            "ETHER does as OFT (mIoU 24.6 and 24.5) with a hundredth of its parameters.",
            f"ETHER is not below OFT in mIoU by more than {tenth}; {interval}.",
            above(table.difference(MAPS, "ether", "oft"), -bound),
            f"{_listed(table, MAPS, ('ether', 'oft'))}; parameters: "
            + ", ".join(f"{TITLES[n]} {table.parameters[n]:,}" for n in ("ether", "oft") if n in table.parameters),
        ),
        Claim(
            "Table 3",
            "Re-fitting magnitudes adds little to OFT (mIoU 24.5, then 24.6).",
            f"the two differ in mIoU by less than {tenth}; {interval}.",
            within(table.difference(MAPS, "oft_magnitude", "oft"), bound),
            _listed(table, MAPS, ("oft", "oft_magnitude")),
        ),
        Claim(
            "Table 3",
            "Orthogonality does not matter: Naive does as OFT (mIoU 24.3 and 24.5).",
            f"the two differ in mIoU by less than {tenth}; {interval}.",
            within(table.difference(MAPS, "naive", "oft"), bound),
            _listed(table, MAPS, ("naive", "oft")),
        ),
    ]


def _figure_3(findings: Findings) -> list[Claim]:
    found = findings.perturbed
    whole = found.get(NO_CHANGE, {}).get(0.0, math.nan)
    kept = {kind: found[kind][max(found[kind])] / whole for kind in ("oft", "ether", "ether_plus") if kind in found}
    told = "; ".join(f"{TITLES[k]} at {max(found[k]):.3g}: {share:.0%}" for k, share in kept.items())
    there = len(kept) == 3 and not math.isnan(whole)
    return [
        Claim(
            "Fig. 3",
            "Random transforms as far as they can go leave the images whole for ETHER and ETHER+, and not for OFT.",
            "at the largest distance ETHER and ETHER+ keep at least three quarters of the untouched base's "
            "CLIP-T, and OFT less than half.",
            decided(kept["ether"] >= 0.75 and kept["ether_plus"] >= 0.75 and kept["oft"] < 0.5 if there else None),
            told,
        )
    ]


def _figure_4(findings: Findings) -> list[Claim]:
    found = {m: {r: one["transform"] for r, one in rows.items()} for m, rows in findings.distances.items()}
    bounded = all(name in found for name in ("ether", "ether_plus"))
    free = all(name in found for name in ("oft", "naive"))

    def span(name: str) -> str:
        low, high = min(found[name]), max(found[name])
        return f"{TITLES[name]} {found[name][low]:.3g} at {low:g}, {found[name][high]:.3g} at {high:g}"

    ends = {name: (found[name][min(found[name])], found[name][max(found[name])]) for name in found}
    return [
        Claim(
            "Fig. 4",
            "ETHER's transforms stay at distance 2 of the identity at every rate, ETHER+'s below the square root of 2.",
            "every mean of ETHER is 2 to a thousandth, and none of ETHER+'s is above 1.4143.",
            decided(
                all(abs(d - 2) < 2e-3 for d in found["ether"].values())
                and all(d <= 1.4143 for d in found["ether_plus"].values())
                if bounded
                else None
            ),
            "; ".join(span(name) for name in ("ether", "ether_plus") if name in found),
        ),
        Claim(
            "Fig. 4",
            "OFT's and Naive's go as far as the rate takes them (.1 to 53 and .05 to 720 over five decades).",
            "from the lowest rate to the highest both grow tenfold and end beyond ETHER's 2.",
            decided(
                all(ends[name][1] > 10 * ends[name][0] and ends[name][1] > 2 for name in ("oft", "naive"))
                if free
                else None
            ),
            "; ".join(span(name) for name in ("oft", "naive") if name in found),
        ),
    ]


def _figure_5(findings: Findings) -> list[Claim]:
    curves = {
        name: miou_by_rate(findings.grids["controllable"], name) for name in ("oft", "naive", "ether", "ether_plus")
    }
    there = all(len(curve) > 1 for curve in curves.values())
    kept = {
        name: sum(value >= KEEPS * max(curve.values()) for value in curve.values())
        for name, curve in curves.items()
        if curve
    }
    last = {
        name: curve[max(curve)] / max(curve.values()) for name, curve in curves.items() if curve and max(curve.values())
    }
    free, bounded = ("oft", "naive"), ("ether", "ether_plus")
    return [
        Claim(
            "Fig. 5",
            "ETHER and ETHER+ do well over more rates than OFT and Naive (within 15% of their best at four and five of "
            "six; at two).",
            f"each of the two keeps {KEEPS:.0%} of its own best mIoU at more rates than each of the others.",
            decided(min(kept[b] for b in bounded) > max(kept[f] for f in free) if there else None),
            "; ".join(f"{TITLES[name]} at {count} of {len(curves[name])} rates" for name, count in kept.items()),
        ),
        Claim(
            "Fig. 5",
            "At the highest rate ETHER and ETHER+ still follow maps (mIoU 21.5 of 24.5, 23.3 of 27.3); OFT and Naive "
            "do not (3.9 of 24.5, 0 of 24).",
            "there ETHER and ETHER+ keep at least three quarters of their own best mIoU, OFT and Naive less than half.",
            decided(all(last[b] >= 0.75 for b in bounded) and all(last[f] < 0.5 for f in free) if there else None),
            "; ".join(f"{TITLES[name]} {share:.0%}" for name, share in last.items()),
        ),
    ]


def _figure_6(findings: Findings) -> list[Claim]:
    shares = {}
    for name in ("oft", "ether_plus"):
        curve = miou_by_step(findings, name)
        if len(curve) > 1:
            steps = sorted(curve, key=lambda step: math.inf if step is None else step)
            shares[name] = (steps[0], curve[steps[0]] / curve[None])
    there = len(shares) == 2
    return [
        Claim(
            "Fig. 6",
            "ETHER+ is near its best after the first of ten epochs, at rates of 1e-4 and above.",
            f"at its best rate ETHER+ has {SOON:.0%} of its last mIoU at the first checkpoint, and no smaller share "
            "than OFT.",
            decided(shares["ether_plus"][1] >= max(SOON, shares["oft"][1]) if there else None),
            "; ".join(f"{TITLES[name]} {share:.0%} at step {step}" for name, (step, share) in shares.items()),
        )
    ]


def _figure_7(findings: Findings) -> list[Claim]:
    last = {name: changes[max(changes)] for name, changes in findings.energies.items()}
    there = all(name in last for name in ("oft", "naive", "ether", "ether_plus"))
    told = "; ".join(f"{TITLES[name]} {value:+.2g}" for name, value in last.items())
    return [
        Claim(
            "Fig. 7",
            "OFT and ETHER leave the hyperspherical energy as it is.",
            "at the end of training both have changed it by less than a hundredth of ETHER+'s change.",
            decided(max(abs(last["oft"]), abs(last["ether"])) < 0.01 * abs(last["ether_plus"]) if there else None),
            told,
        ),
        Claim(
            "Fig. 7",
            "ETHER+ changes it most, Naive less (about .0158 and .0016), to no harm.",
            "ETHER+'s change is larger in size than Naive's.",
            decided(abs(last["ether_plus"]) > abs(last["naive"]) if there else None),
            told,
        ),
    ]


def miou_by_rate(grid: Iterable[Summary], method: str) -> dict[float, float]:
    """A method's last mIoU by learning rate; 0 where the training diverged."""
    found = {}
    for one in grid:
        if one.method == method and one.step is None and (one.scored or one.diverged):
            found[float(one.at(RATE) or 0)] = one.values[MAPS].mean if one.scored else 0.0
    return found


def miou_by_step(findings: Findings, method: str) -> dict[int | None, float]:
    """A method's mIoU by step at its best rate; None: the last."""
    chosen = findings.chosen["controllable"].get(method)
    if chosen is None:
        return {}
    rows = [one for one in findings.grids["controllable"] if one.method == method and one.point == chosen.cell.point]
    return {one.step: one.values[MAPS].mean for one in rows if one.scored}


def _listed(table: Scores, metric: str, methods: Iterable[str]) -> str:
    return ", ".join(f"{TITLES[name]} {table.value(name, metric):.3f}" for name in methods if name in table.results)

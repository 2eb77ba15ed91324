"""Verdicts on claims from readings, with one familywise error over all claims and both looks.

Every claim states its smallest effect of interest beforehand. It *holds* if the data exclude that it is wrong, *does
not hold* if they exclude an effect of that size, and is undecided otherwise:

- "A beats all" holds if every one-sided test rejects at the level (an intersection-union test, Berger 1982: no
  correction inside the claim), and does not hold if one of them, at the level over their number, excludes the effect.
- "As good as" is non-inferiority, "neither better nor worse" equivalence, within a stated margin.

Across claims the familywise error is at most 5%: 2.5% for claims that hold and 2.5% for claims that do not, each by
Holm (1979). There are two looks, after three seeds and, for what is still undecided, after six; the level is split
between them. Neither the number of claims nor the split depends on what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .readings import Difference, Readings

LEVEL = 0.05
LOOKS: Mapping[int, float] = {3: 0.3, 6: 0.7}
"""By the number of seeds of a look: its share of the level."""

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Part:
    """A difference that a claim is about.

    Attributes:
        title: For people.
        difference: From the readings; None: not measured.
        least: The claim says that the true difference is above this.
        excluded: And does not hold if it is below this, the smallest effect of interest.
    """

    title: str
    difference: Callable[[Readings], Difference | None]
    least: float
    excluded: float


@dataclass(frozen=True)
class EmpiricalClaim:
    """A claim that data can contradict: all its parts must be true.

    Attributes:
        name: Short, unique.
        paper: The claim in words, with the paper's numbers.
        effect: The smallest effect of interest or the margin, in words.
    """

    name: str
    paper: str
    effect: str
    parts: tuple[Part, ...]

    def tests(self, readings: Readings) -> tuple[float, float] | None:
        """The p values of "it does not hold", and of "it holds with the effect of interest"; None: not measured."""
        found = [(part, part.difference(readings)) for part in self.parts]
        if any(difference is None for _, difference in found):
            return None
        known = [(part, difference) for part, difference in found if difference is not None]
        holds = max(difference.above(part.least) for part, difference in known)
        fails = min(1.0, len(known) * min(difference.below(part.excluded) for part, difference in known))
        return holds, fails


@dataclass(frozen=True)
class Decision:
    """A verdict, with what decided it.

    Attributes:
        seeds: Of the look that decided, or of the last one.
        deciding: The part with the largest p value of a claim that holds or is undecided; else with the smallest.
    """

    claim: EmpiricalClaim
    verdict: Verdict
    seeds: int
    deciding: Part | None
    difference: Difference | None

    @property
    def found(self) -> str:
        """The difference, its interval, the trainings behind it, and the part that decided."""
        if self.deciding is None or self.difference is None:
            return "not measured"
        i = self.difference.interval()
        numbers = f"{i.value:+.3f} [{i.low:+.3f}, {i.high:+.3f}]"
        return f"{self.deciding.title}: {numbers}, {self.difference.trainings} trainings, {self.seeds} seeds"


def decide(claims: Sequence[EmpiricalClaim], readings: Readings, level: float = LEVEL) -> list[Decision]:
    """The verdicts, in the order of the claims, from as many looks as the readings have seeds for.

    A claim that is decided at a look is not tested again. In each direction a claim counts in Holm's procedure until it
    is rejected in that direction, whatever else is known of it, so that the error is at most the sum of the shares.
    """
    decided: dict[str, Decision] = {}
    latest: dict[str, tuple[int, tuple[float, float]]] = {}
    for seeds, share in LOOKS.items():
        seen = readings.only(seeds)
        for claim in claims:
            if claim.name not in decided and _is_complete(claim, readings, seeds) and (tests := claim.tests(seen)):
                latest[claim.name] = seeds, tests
        now = {name: tests for name, (look, tests) in latest.items() if look == seeds and name not in decided}
        for direction, verdict in enumerate(("holds", "does not hold")):
            before = sum(one.verdict == verdict for one in decided.values())
            chosen = holm({n: t[direction] for n, t in now.items()}, share * level / 2, len(claims) - before)
            for claim in claims:
                if claim.name in chosen and claim.name not in decided:
                    decided[claim.name] = _decision(claim, seen, verdict, seeds)
    for claim in claims:
        if claim.name not in decided:
            seeds = latest[claim.name][0] if claim.name in latest else 0
            verdict = "undecided" if seeds else "not measured"
            decided[claim.name] = _decision(claim, readings.only(seeds or 1), verdict, seeds)
    return [decided[claim.name] for claim in claims]


def holm(p_values: Mapping[str, float], level: float, count: int) -> set[str]:
    """The names that Holm's step-down procedure rejects.

    Args:
        count: Of the hypotheses that were not rejected before: those here, and others whose p values are not known.
    """
    rejected: set[str] = set()
    for name, p in sorted(p_values.items(), key=lambda pair: pair[1]):
        if p > level / (count - len(rejected)):
            break
        rejected.add(name)
    return rejected


def _is_complete(claim: EmpiricalClaim, readings: Readings, seeds: int) -> bool:
    """Whether the claim has readings of so many seeds."""
    found = [part.difference(readings.only(seeds)) for part in claim.parts]
    before = [part.difference(readings.only(seeds - 1)) for part in claim.parts]
    known = [(now, was) for now, was in zip(found, before, strict=True) if now is not None]
    return len(known) == len(found) and all(was is None or was.trainings < now.trainings for now, was in known)


def _decision(claim: EmpiricalClaim, readings: Readings, verdict: Verdict, seeds: int) -> Decision:
    found = [(part, part.difference(readings)) for part in claim.parts]
    known = [(part, difference) for part, difference in found if difference is not None]
    if verdict == "not measured" or not known:
        return Decision(claim, verdict, seeds, None, None)
    if verdict == "does not hold":
        part, difference = min(known, key=lambda pair: pair[1].below(pair[0].excluded))
    else:
        part, difference = max(known, key=lambda pair: pair[1].above(pair[0].least))
    return Decision(claim, verdict, seeds, part, difference)


def table(decisions: Iterable[Decision]) -> str:
    """The verdicts as Markdown."""
    lines = ["| claim | smallest effect of interest | verdict | what decided |", "|---|---|---|---|"]
    for one in decisions:
        verdict = one.verdict if one.verdict in ("undecided", "not measured") else f"**{one.verdict}**"
        lines.append(f"| {one.claim.paper} | {one.claim.effect} | {verdict} | {one.found} |")
    return "\n".join(lines) + "\n"

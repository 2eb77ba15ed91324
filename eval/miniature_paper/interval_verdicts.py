"""Claims of the paper, and their verdicts from intervals of the miniature's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ether_diffusion.evaluation.intervals import Interval

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the result here.

    Attributes:
        where: The table or figure.
        paper: The claim with its numbers.
        criterion: What decides, in words.
        found: The numbers that decided, in words.
    """

    where: str
    paper: str
    criterion: str
    verdict: Verdict
    found: str


def above(difference: Interval | None, by: float = 0.0) -> Verdict:
    """Whether a difference is larger than `by`; undecided if its interval contains `by`."""
    if difference is None or math.isnan(by):
        return "not measured"
    if difference.low > by:
        return "holds"
    return "does not hold" if difference.high < by else "undecided"


def within(difference: Interval | None, bound: float) -> Verdict:
    """Whether a difference is smaller than a bound, in both directions."""
    if difference is None or math.isnan(bound):
        return "not measured"
    if -bound < difference.low and difference.high < bound:
        return "holds"
    return "does not hold" if difference.low > bound or difference.high < -bound else "undecided"


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several parts, all of which must hold."""
    found = list(verdicts)
    for worst in ("does not hold", "not measured", "undecided"):
        if worst in found:
            return worst
    return "holds" if found else "not measured"


def decided(condition: bool | None) -> Verdict:
    """The verdict of numbers without intervals; None: they are missing."""
    if condition is None:
        return "not measured"
    return "holds" if condition else "does not hold"

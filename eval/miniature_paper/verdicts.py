"""Claims of the paper and their verdicts in the miniature: what an interval decides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .estimates import Difference

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]


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

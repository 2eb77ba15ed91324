"""The paper's claims that data can contradict, with their smallest effects of interest, stated before any training.

Effects are in units of the metric: `backbone` and CLIP-T are cosines (the untrained base has about .02 of `backbone`,
the photos .81); mIoU and accuracy are shares. What holds by algebra (distances of ETHER and ETHER+, energies under
orthogonal transforms) is no claim: it is checked apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from .decisions import EmpiricalClaim, Part
from .readings import Difference, Readings

SUBJECTS, MAPS, CAPTIONED = "subjects", "maps", "captioned_maps"
SUBJECT, PROMPT, MIOU, ACCURACY = "backbone", "CLIP-T", "mIoU", "accuracy"
FASTER = "mIoU after a tenth of the steps"
HIGHEST = "mIoU at the highest rate"

LIKENESS = 0.05
"""Of `backbone`: about a sixteenth of the way from the base to the photos."""
PROMPTED = 0.03
MAPPED = 0.01
"""Of mIoU: a fifth of what a near-full adapter adds to the encoder alone (.054, measured)."""
MUCH = 1 / 3
"""Share of the near-full reference's gain over the encoder alone that counts as much."""
KEPT = 0.75
"""Share of a method's own gain that counts as kept."""
ROW = ("full", "lora", "oft", "naive", "ether", "ether_plus", "ether_plus_one_sided")
ADAPTERS = ("oft", "naive", "ether", "ether_plus")
NONE, REFERENCE = "none", "lora_64"


def _above(table: str, metric: str, one: str, other: str, effect: float) -> Part:
    """`one` is higher than `other`; excluded where its lead is below the effect."""
    return Part(f"{one} - {other}, {metric}", lambda r: r.difference(table, metric, one, other), 0.0, effect)


def _not_below(table: str, metric: str, one: str, other: str, margin: float) -> Part:
    """`one` is at most the margin below `other`."""
    return Part(f"{one} - {other}, {metric}", lambda r: r.difference(table, metric, one, other), -margin, -margin)


def beats_all(table: str, metric: str, one: str, others: Iterable[str], effect: float) -> tuple[Part, ...]:
    """`one` is higher than each of the others."""
    return tuple(_above(table, metric, one, other, effect) for other in others if other != one)


def equivalent(table: str, metric: str, one: str, other: str, margin: float) -> tuple[Part, ...]:
    """The two differ by at most the margin: two one-sided tests."""
    return (_not_below(table, metric, one, other, margin), _not_below(table, metric, other, one, margin))


def _share_of_gain(one: str, whole: str, share: float, metric: str = MIOU) -> Part:
    """The gain of `one` over the encoder alone, in this metric, is at least this share of that of `whole` in mIoU."""

    def difference(readings: Readings) -> Difference | None:
        return readings.shifted(MAPS, (metric, one), ((MIOU, whole, share), (MIOU, NONE, 1 - share)))

    return Part(f"{one}, {metric}, less {share:.0%} of the gain of {whole}", difference, 0.0, 0.0)


CLAIMS: tuple[EmpiricalClaim, ...] = (
    EmpiricalClaim(
        "most like the subject",
        "Table 2: ETHER+ has the highest subject fidelity (DINO .666; the next .660).",
        f"{LIKENESS} of {SUBJECT}",
        beats_all(SUBJECTS, SUBJECT, "ether_plus", ROW, LIKENESS),
    ),
    EmpiricalClaim(
        "least like, most prompted",
        "Table 2: ETHER has the lowest subject fidelity (DINO .567) and the highest prompt fidelity (CLIP-T .256).",
        f"{LIKENESS} of {SUBJECT}, {PROMPTED} of {PROMPT}",
        (
            *(_above(SUBJECTS, SUBJECT, other, "ether", LIKENESS) for other in ROW if other != "ether"),
            *beats_all(SUBJECTS, PROMPT, "ether", ROW, PROMPTED),
        ),
    ),
    EmpiricalClaim(
        "one side is between",
        "Table 2: one-sided ETHER+ is between ETHER and ETHER+ (DINO .567 < .618 < .666).",
        f"{LIKENESS} of {SUBJECT}",
        (
            _above(SUBJECTS, SUBJECT, "ether_plus_one_sided", "ether", LIKENESS),
            _above(SUBJECTS, SUBJECT, "ether_plus", "ether_plus_one_sided", LIKENESS),
        ),
    ),
    EmpiricalClaim(
        "orthogonality and subjects",
        "Table 2: orthogonality does not matter, Naive does as well as OFT (DINO .648 and .652).",
        f"equivalent within {LIKENESS} of {SUBJECT}",
        equivalent(SUBJECTS, SUBJECT, "naive", "oft", LIKENESS),
    ),
    EmpiricalClaim(
        "follows maps best",
        "Table 3: ETHER+ follows maps best (mIoU 27.3, accuracy 68.1; the next 24.6 and 63.3).",
        f"{MAPPED} of mIoU and of accuracy",
        (
            *beats_all(MAPS, MIOU, "ether_plus", ADAPTERS, MAPPED),
            *beats_all(MAPS, ACCURACY, "ether_plus", ADAPTERS, MAPPED),
        ),
    ),
    EmpiricalClaim(
        "adapters add much",
        "Table 3: every adapter adds much to the encoder alone (mIoU 8.2 without, 24.3 to 27.3 with).",
        f"{MUCH:.0%} of what LoRA r=64 adds",
        tuple(_share_of_gain(name, REFERENCE, MUCH) for name in ADAPTERS),
    ),
    EmpiricalClaim(
        "as good as OFT",
        "Table 3: ETHER does as well as OFT (mIoU 24.6 and 24.5) with a hundredth of its parameters.",
        f"not below by {MAPPED} of mIoU",
        (_not_below(MAPS, MIOU, "ether", "oft", MAPPED),),
    ),
    EmpiricalClaim(
        "orthogonality and maps",
        "Table 3: orthogonality does not matter, Naive does as well as OFT (mIoU 24.3 and 24.5).",
        f"equivalent within {MAPPED} of mIoU",
        equivalent(MAPS, MIOU, "naive", "oft", MAPPED),
    ),
    EmpiricalClaim(
        "bounded at the highest rate",
        "Fig. 5: at the highest rate ETHER and ETHER+ still follow maps (21.5 of 24.5, 23.3 of 27.3).",
        f"{KEPT:.0%} of their own best gain is kept",
        tuple(_share_of_gain(name, name, KEPT, HIGHEST) for name in ("ether", "ether_plus")),
    ),
    EmpiricalClaim(
        "unbounded at the highest rate",
        "Fig. 5: at the highest rate OFT and Naive do not follow maps (3.9 of 24.5, 0 of 24).",
        f"ETHER+ is ahead of both by {MAPPED} of mIoU",
        tuple(_above(MAPS, HIGHEST, "ether_plus", name, MAPPED) for name in ("oft", "naive")),
    ),
    EmpiricalClaim(
        "soon near its best",
        "Fig. 6: ETHER+ is near its best after the first of ten epochs.",
        f"{KEPT:.0%} of its own best gain",
        (_share_of_gain("ether_plus", "ether_plus", KEPT, FASTER),),
    ),
)
"""In the order of the paper's tables and figures."""

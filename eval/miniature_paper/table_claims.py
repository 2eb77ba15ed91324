"""What the paper's tables claim, decided by the miniature's."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .choice import FAITHFULNESS, LIKENESS, MAPS
from .findings import Scores
from .numbers import TITLES
from .verdicts import Claim, above, all_of, within

LITTLE = 0.1
"""The share of a gain up to which two methods count as equal."""
MUCH = 1 / 3
"""The share of what an adapter could add to the encoder alone that counts as much. The paper's add half of it: 16 to 19
points of 34, as UPerNet-101 has a mean IoU of 42% on real images."""


def table_2_claims(table: Scores) -> list[Claim]:
    """Subject-driven generation."""
    methods = ("full", "lora", "oft", "naive", "ether", "ether_plus", "ether_plus_one_sided")
    interval = "95% t intervals of the difference, over subjects"
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


def table_3_claims(table: Scores) -> list[Claim]:
    """Semantic maps to images."""
    methods = ("oft", "oft_magnitude", "naive", "ether", "ether_plus")
    interval = "95% intervals of the difference, over scenes that both drew"
    gain = table.value("oft", MAPS) - table.value("none", MAPS)
    bound = LITTLE * abs(gain)
    values = _listed(table, MAPS, ("none", *methods))
    others = [name for name in methods if name != "ether_plus"]
    real = next((one.ceilings[MAPS] for one in table.results.values()), math.nan)
    much = MUCH * (real - table.value("none", MAPS))
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
            "each method is above the encoder alone in mIoU by a third of what lies between that and the real scenes, "
            f"here {much:.3f}; {interval}.",
            all_of(above(table.difference(MAPS, name, "none"), much) for name in methods),
            f"{values}; real scenes {real:.3f}",
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


def _listed(table: Scores, metric: str, methods: Iterable[str]) -> str:
    return ", ".join(f"{TITLES[name]} {table.value(name, metric):.3f}" for name in methods if name in table.results)

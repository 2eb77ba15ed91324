"""The claims of the paper's tables, decided by the miniature's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ether_diffusion.analysis.published import TABLE_2, TABLE_3

from .best_rates import MAPS, PROMPT, SUBJECT
from .config import TITLES
from .interval_verdicts import Claim, above, all_of, within
from .paper_findings import Scores

LITTLE = 0.1
"""The share of a gain up to which two methods count as equal."""
MUCH = 1 / 3
"""The share of an adapter's largest possible gain over the encoder alone that counts as much. The paper's adapters gain
half of it: 16 to 19 points of 34, as UPerNet-101 has a mean IoU of 42% on real images (`published.TABLE_3_REAL`)."""


def table_2_claims(table: Scores) -> list[Claim]:
    """Subject-driven generation."""
    methods = ("full", "lora", "oft", "naive", "ether", "ether_plus", "ether_plus_one_sided")
    interval = "95% t intervals of the difference, over subjects"
    others = [name for name in methods if name != "ether_plus"]
    rest = [name for name in methods if name != "ether"]
    subject = _listed(table, SUBJECT, methods)
    real = next((one.ceilings[SUBJECT] for one in table.results.values()), math.nan)
    bound = LITTLE * (real - table.value("base", SUBJECT))
    return [
        Claim(
            "Table 2",
            f"ETHER+ has the highest subject fidelity (DINO {_dino('ether_plus')}; LoRA {_dino('lora')}, "
            f"OFT {_dino('oft')}, Naive {_dino('naive')}, DreamBooth {_dino('full')}).",
            f"ETHER+ is above each of the other methods in {SUBJECT}; {interval}.",
            all_of(above(table.difference(SUBJECT, "ether_plus", other)) for other in others),
            subject,
        ),
        Claim(
            "Table 2",
            f"ETHER has the lowest subject fidelity (DINO {_dino('ether')}) and the highest prompt fidelity (CLIP-T "
            f"{_short(TABLE_2['ether']['CLIP-T'])}).",
            f"ETHER is below each of the other methods in {SUBJECT} and above each in {PROMPT}; {interval}.",
            all_of(
                [
                    *(above(table.difference(SUBJECT, other, "ether")) for other in rest),
                    *(above(table.difference(PROMPT, "ether", other)) for other in rest),
                ]
            ),
            _listed(table, PROMPT, methods),
        ),
        Claim(
            "Table 2",
            f"One-sided ETHER+ is between ETHER and ETHER+ (DINO {_dino('ether')} < {_dino('ether_plus_one_sided')} < "
            f"{_dino('ether_plus')}).",
            f"both differences in {SUBJECT} are above 0; {interval}.",
            all_of(
                [
                    above(table.difference(SUBJECT, "ether_plus_one_sided", "ether")),
                    above(table.difference(SUBJECT, "ether_plus", "ether_plus_one_sided")),
                ]
            ),
            _listed(table, SUBJECT, ("ether", "ether_plus_one_sided", "ether_plus")),
        ),
        Claim(
            "Table 2",
            f"Orthogonality does not matter: Naive does as well as OFT (DINO {_dino('naive')} and {_dino('oft')}).",
            f"they differ in {SUBJECT} by less than a tenth of the distance between the untrained base and the photos, "
            f"here {bound:.3f}; {interval}.",
            within(table.difference(SUBJECT, "naive", "oft"), bound),
            _listed(table, SUBJECT, ("naive", "oft")),
        ),
    ]


def table_3_claims(table: Scores) -> list[Claim]:
    """Semantic maps to images."""
    methods = ("oft", "oft_magnitude", "naive", "ether", "ether_plus")
    interval = "95% intervals of the difference, over the same scenes"
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
            f"ETHER+ follows maps best (mIoU {_map('ether_plus')}, accuracy {_map('ether_plus', 'accuracy')}; the next "
            f"{_map('ether')} and {_map('ether', 'accuracy')}).",
            f"ETHER+ is above each of the other methods in mIoU and in accuracy; {interval}.",
            all_of(above(table.difference(name, "ether_plus", o)) for name in (MAPS, "accuracy") for o in others),
            f"{values}; accuracy: {_listed(table, 'accuracy', methods)}",
        ),
        Claim(
            "Table 3",
            f"Every adapter adds much to the encoder alone (mIoU {_map('none')} without, {_map('naive')} to "
            f"{_map('ether_plus')} with).",
            "in mIoU each method is above the encoder alone by a third of the distance between the encoder alone and "
            f"the real scenes, here {much:.3f}; {interval}.",
            all_of(above(table.difference(MAPS, name, "none"), much) for name in methods),
            f"{values}; real scenes {real:.3f}",
        ),
        Claim(
            "Table 3",
            f"ETHER does as well as OFT (mIoU {_map('ether')} and {_map('oft')}) with a hundredth of its parameters.",
            f"ETHER is not below OFT in mIoU by more than {tenth}; {interval}.",
            above(table.difference(MAPS, "ether", "oft"), -bound),
            f"{_listed(table, MAPS, ('ether', 'oft'))}; parameters: "
            + ", ".join(f"{TITLES[n]} {table.parameters[n]:,}" for n in ("ether", "oft") if n in table.parameters),
        ),
        Claim(
            "Table 3",
            f"Re-fitting magnitudes adds little to OFT (mIoU {_map('oft')}, then {_map('oft_magnitude')}).",
            f"the two differ in mIoU by less than {tenth}; {interval}.",
            within(table.difference(MAPS, "oft_magnitude", "oft"), bound),
            _listed(table, MAPS, ("oft", "oft_magnitude")),
        ),
        Claim(
            "Table 3",
            f"Orthogonality does not matter: Naive does as well as OFT (mIoU {_map('naive')} and {_map('oft')}).",
            f"the two differ in mIoU by less than {tenth}; {interval}.",
            within(table.difference(MAPS, "naive", "oft"), bound),
            _listed(table, MAPS, ("naive", "oft")),
        ),
    ]


def _dino(method: str) -> str:
    return _short(TABLE_2[method]["DINO"])


def _map(method: str, metric: str = "mIoU") -> str:
    return f"{TABLE_3[method][metric]:g}"


def _short(value: float) -> str:
    """A number below 1 as the paper prints it: `.660`."""
    return f"{value:.3f}".lstrip("0")


def _listed(table: Scores, metric: str, methods: Iterable[str]) -> str:
    return ", ".join(f"{TITLES[name]} {table.value(name, metric):.3f}" for name in methods if name in table.results)

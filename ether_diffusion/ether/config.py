"""Settings of an ETHER or ETHER+ adapter, as a PEFT config."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from .weight_config import BlocksConfig

VARIANTS = ("ether", "ether_plus")
SIDES = ("in", "both")


class EtherPeftType(str, enum.Enum):
    """The method's name where PEFT expects a member of its own, closed `PeftType`."""

    ETHER = "ETHER"


@dataclass
class EtherConfig(BlocksConfig):
    """Configuration of an adapter that learns reflections of a frozen layer's input (and output).

    Args:
        variant: `"ether"`, `H = I - 2 u u^T`, or `"ether_plus"`, `H+ = I - u u^T + v v^T`.
        num_blocks: Number n of diagonal blocks, each with its own vectors. Must divide the features of every adapted
            side of every layer into blocks at least two wide. The number of parameters does not depend on it.
        sides: `"in"` transforms the layer's input, `"both"` its output too. Default: `"in"` for ETHER, `"both"` for
            ETHER+, as in the paper.
        target_modules: Names (or suffixes of names) of the layers to adapt, a regular expression, or `"all-linear"`.
        exclude_modules: The same for layers to leave alone.
        sides_pattern: Exceptions to `sides`: module name, suffix or regular expression -> `"in"` or `"both"`.
        blocks_pattern: Exceptions to `num_blocks`: module name, suffix or regular expression -> number of blocks.
        modules_to_save: Modules other than the adapted layers that are trained whole and saved with the adapter.
        init_weights: `True`: u as in the authors' language-model code, uniform in ±1/sqrt(b), and for ETHER+ v = -u,
            the identity. ETHER starts at a random reflection and is NOT the identity. `False`: u and v independent.

    Raises:
        ValueError: a value outside of those named above.
    """

    variant: Literal["ether", "ether_plus"] = field(
        default="ether_plus", metadata={"help": "'ether' (H = I - 2uu^T) or 'ether_plus' (H+ = I - uu^T + vv^T)."}
    )
    sides: Literal["in", "both"] | None = field(
        default=None,
        metadata={"help": "'in' or 'both'; default: 'in' for ether, 'both' for ether_plus."},
    )
    sides_pattern: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Exceptions to `sides`: module name or pattern -> 'in' or 'both'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EtherPeftType.ETHER  # pyright: ignore[reportAttributeAccessIssue]
        _one_of("variant", self.variant, VARIANTS)
        if self.sides is None:
            self.sides = "in" if self.variant == "ether" else "both"
        _one_of("sides", self.sides, SIDES)
        self.sides_pattern = dict(self.sides_pattern or {})  # JSON null stands for an absent dictionary
        for pattern, sides in self.sides_pattern.items():
            _one_of(f"sides_pattern[{pattern!r}]", sides, SIDES)

    def sides_of(self, module_name: str) -> str:
        """Sides of the layer of this name, exceptions considered."""
        sides = self.sides_pattern.get(get_pattern_key(list(self.sides_pattern), module_name), self.sides)
        assert sides is not None  # filled in when the config was made
        return sides


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"EtherConfig: {name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")

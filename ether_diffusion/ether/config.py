"""Settings of an ETHER or ETHER+ adapter, as a PEFT config."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

VARIANTS = ("ether", "ether_plus")
SIDES = ("in", "both")


class EtherPeftType(str, enum.Enum):
    """The method's name where PEFT expects a member of its own, closed `PeftType`."""

    ETHER = "ETHER"


@dataclass
class EtherConfig(PeftConfig):
    """Configuration of an adapter that reflects a frozen layer's input (and output) at learned hyperplanes.

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
        modules_to_save: Modules beside the adapted layers that are trained whole and saved with the adapter.
        init_weights: `True`: u as in the authors' language-model code, uniform in ±1/sqrt(b), and for ETHER+ v = -u,
            the identity. ETHER starts at a random reflection and is NOT the identity. `False`: u and v independent.

    Raises:
        ValueError: a value outside of those named above.
    """

    variant: Literal["ether", "ether_plus"] = field(
        default="ether_plus", metadata={"help": "'ether' (H = I - 2uu^T) or 'ether_plus' (H+ = I - uu^T + vv^T)."}
    )
    num_blocks: int = field(default=1, metadata={"help": "Number of diagonal blocks."})
    sides: Literal["in", "both"] | None = field(
        default=None,
        metadata={"help": "'in' or 'both'; default: 'in' for ether, 'both' for ether_plus."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or suffixes of the layers to adapt, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of layers to leave alone."}
    )
    sides_pattern: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Exceptions to `sides`: module name or pattern -> 'in' or 'both'."}
    )
    blocks_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Exceptions to `num_blocks`: module name or pattern -> blocks."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules beside the adapted layers that are trained and saved whole."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False draws u and v independently: a random transform instead of the default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EtherPeftType.ETHER  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        _one_of("variant", self.variant, VARIANTS)
        if self.sides is None:
            self.sides = "in" if self.variant == "ether" else "both"
        # JSON null stands for an absent dictionary.
        self.sides_pattern = dict(self.sides_pattern or {})
        self.blocks_pattern = dict(self.blocks_pattern or {})
        _one_of("sides", self.sides, SIDES)
        _at_least_one("num_blocks", self.num_blocks)
        for pattern, sides in self.sides_pattern.items():
            _one_of(f"sides_pattern[{pattern!r}]", sides, SIDES)
        for pattern, blocks in self.blocks_pattern.items():
            _at_least_one(f"blocks_pattern[{pattern!r}]", blocks)

    def sides_of(self, module_name: str) -> str:
        """Sides of the layer of this name, exceptions considered."""
        sides = self.sides_pattern.get(get_pattern_key(list(self.sides_pattern), module_name), self.sides)
        assert sides is not None  # filled in when the config was made
        return sides

    def blocks_of(self, module_name: str) -> int:
        """Number of blocks of the layer of this name, exceptions considered."""
        return self.blocks_pattern.get(get_pattern_key(list(self.blocks_pattern), module_name), self.num_blocks)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"EtherConfig: {name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"EtherConfig: {name} is {value!r}; allowed: whole numbers from 1.")

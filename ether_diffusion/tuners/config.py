"""Settings of Naive and magnitude adapters, as PEFT configs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.other import get_pattern_key


class TunerPeftType(str, enum.Enum):
    """The methods' names where PEFT expects members of its own, closed `PeftType`."""

    NAIVE = "NAIVE"
    MAGNITUDE = "MAGNITUDE"


@dataclass
class _TunerConfig(PeftConfig):
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or suffixes of the layers to adapt, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of layers to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules beside the adapted layers that are trained and saved whole."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: a random change of the layer instead of none at the start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class NaiveConfig(_TunerConfig):
    """Configuration of an adapter that multiplies a frozen layer's input by free, block-diagonal matrices.

    OFT without orthogonality: R = blockdiag(R_1 ... R_n), each R_i of (in/n)^2 free entries, and W' = W R^T for a
    weight W (out, in). It starts at R = I.

    Args:
        num_blocks: Number n of diagonal blocks. Must divide the input features of every layer. The number of
            parameters is in^2 / n a layer.
        blocks_pattern: Exceptions to `num_blocks`: module name, suffix or regular expression -> number of blocks.
        target_modules: Names (or suffixes of names) of the layers to adapt, a regular expression, or `"all-linear"`.
        exclude_modules: The same for layers to leave alone.
        modules_to_save: Modules beside the adapted layers that are trained whole and saved with the adapter.
        init_weights: `False`: each R_i differs from the identity by random numbers.

    Raises:
        ValueError: a number of blocks below 1.
    """

    num_blocks: int = field(default=4, metadata={"help": "Number of diagonal blocks."})
    blocks_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Exceptions to `num_blocks`: module name or pattern -> blocks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TunerPeftType.NAIVE  # pyright: ignore[reportAttributeAccessIssue]
        self.blocks_pattern = dict(self.blocks_pattern or {})  # JSON null stands for an absent dictionary
        given = {"num_blocks": self.num_blocks}
        given |= {f"blocks_pattern[{pattern!r}]": blocks for pattern, blocks in self.blocks_pattern.items()}
        for name, blocks in given.items():
            if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
                raise ValueError(f"NaiveConfig: {name} is {blocks!r}; allowed: whole numbers from 1.")

    def blocks_of(self, module_name: str) -> int:
        """Number of blocks of the layer of this name, exceptions considered."""
        return self.blocks_pattern.get(get_pattern_key(list(self.blocks_pattern), module_name), self.num_blocks)


@dataclass
class MagnitudeConfig(_TunerConfig):
    """Configuration of an adapter that scales each row of a frozen layer's weight: W' = diag(s) W, from s = 1 on.

    The bias stays as it is. OFT's authors re-fit these magnitudes after OFT, which cannot change them.

    Args:
        target_modules: Names (or suffixes of names) of the layers to adapt, a regular expression, or `"all-linear"`.
        exclude_modules: The same for layers to leave alone.
        modules_to_save: Modules beside the adapted layers that are trained whole and saved with the adapter.
        init_weights: `False`: each s differs from 1 by a random number.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TunerPeftType.MAGNITUDE  # pyright: ignore[reportAttributeAccessIssue]

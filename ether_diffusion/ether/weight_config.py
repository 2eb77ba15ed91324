"""What the configs share of methods that turn a layer's weight into another one: which layers, and how many blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key


@dataclass
class WeightConfig(PeftConfig):
    """Which layers an adapter is for.

    Args:
        target_modules: Names (or suffixes of names) of the layers to adapt, a regular expression, or `"all-linear"`.
        exclude_modules: The same for layers to leave alone.
        modules_to_save: Modules other than the adapted layers that are trained whole and saved with the adapter.
        init_weights: `False`: an adapter of random values, instead of the method's own start.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or suffixes of the layers to adapt, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of layers to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules other than the adapted layers that are trained and saved whole."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: random values instead of the method's own start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


@dataclass
class BlocksConfig(WeightConfig):
    """And into how many diagonal blocks a layer's features are divided.

    Args:
        num_blocks: Number of diagonal blocks.
        blocks_pattern: Exceptions to `num_blocks`: module name, suffix or regular expression -> number of blocks.

    Raises:
        ValueError: a number of blocks below 1.
    """

    num_blocks: int = field(default=1, metadata={"help": "Number of diagonal blocks."})
    blocks_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Exceptions to `num_blocks`: module name or pattern -> blocks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks_pattern = dict(self.blocks_pattern or {})  # JSON null stands for an absent dictionary
        given: dict[str, Any] = {"num_blocks": self.num_blocks}
        given |= {f"blocks_pattern[{pattern!r}]": blocks for pattern, blocks in self.blocks_pattern.items()}
        for name, blocks in given.items():
            if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {blocks!r}; allowed: whole numbers from 1.")

    def blocks_of(self, module_name: str) -> int:
        """Number of blocks of the layer of this name, exceptions considered."""
        return self.blocks_pattern.get(get_pattern_key(list(self.blocks_pattern), module_name), self.num_blocks)

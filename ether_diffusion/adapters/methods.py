"""The table of fine-tuning methods: each entry has its typed settings, its default rates and its PEFT config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from peft import LoraConfig, PeftConfig
from pydantic import Field, PositiveInt

from ether_diffusion.config import Settings
from ether_diffusion.ether import EtherConfig

from .targets import target_modules


class MethodSettings(Settings):
    """What every method has."""

    # Learning rates of the paper, by task.
    learning_rates: ClassVar[dict[str, float]]
    title: ClassVar[str]

    method: Any = None
    target: str | list[str] = "attention"
    """A preset (attention, attention+geglu, linear, all), a list of names or endings, or a regular expression."""
    init_from: Path | None = None
    """A saved adapter of the same method and shape, or a run folder, whose weights are the starting point."""

    text_encoder: bool = False
    """Put an adapter of the same settings on the text encoder's attention, too."""

    def for_text_encoder(self) -> MethodSettings:
        """The same settings with the text encoder's attention as target."""
        patterns = {name: {} for name in ("sides_pattern", "blocks_pattern") if name in type(self).model_fields}
        return self.model_copy(update={"target": ["q_proj", "k_proj", "v_proj", "out_proj"], **patterns})

    def peft_config(self) -> PeftConfig:
        raise NotImplementedError


class _Ether(MethodSettings):
    num_blocks: PositiveInt = 1
    sides_pattern: dict[str, Literal["in", "both"]] = Field(default={})
    blocks_pattern: dict[str, PositiveInt] = Field(default={})
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}

    def _config(self, variant: Literal["ether", "ether_plus"], sides: Literal["in", "both"]) -> PeftConfig:
        return EtherConfig(
            variant=variant,
            sides=sides,
            num_blocks=self.num_blocks,
            target_modules=target_modules(self.target),
            sides_pattern=dict(self.sides_pattern),
            blocks_pattern=dict(self.blocks_pattern),
        )


class EtherSettings(_Ether):
    """ETHER, H = I - 2 u u^T, on the layer's input."""

    title: ClassVar[str] = "ETHER"
    method: Literal["ether"] = "ether"
    sides: Literal["in", "both"] = "in"

    def peft_config(self) -> PeftConfig:
        return self._config("ether", self.sides)


class EtherPlusSettings(_Ether):
    """ETHER+, H+ = I - u u^T + v v^T, on the layer's input and output."""

    title: ClassVar[str] = "ETHER+"
    method: Literal["ether_plus"] = "ether_plus"
    sides: Literal["in", "both"] = "both"

    def peft_config(self) -> PeftConfig:
        return self._config("ether_plus", self.sides)


class LoraSettings(MethodSettings):
    """LoRA, W + (alpha / rank) B A, by PEFT."""

    title: ClassVar[str] = "LoRA"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-4, "controllable": 1e-4}
    method: Literal["lora"] = "lora"
    rank: PositiveInt = 4
    alpha: float | None = None
    """Default: the rank, so that the factor is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def peft_config(self) -> PeftConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules=target_modules(self.target),
        )


class NoAdapterSettings(Settings):
    """No adapter: the base stays as it is. For tasks that train something beside it."""

    title: ClassVar[str] = "none"
    learning_rates: ClassVar[dict[str, float]] = {"controllable": 1e-4}
    method: Literal["none"] = "none"
    init_from: Path | None = None
    """A saved run, whose weights beside the base are the starting point."""


METHODS: dict[str, type[MethodSettings]] = {
    "ether": EtherSettings,
    "ether_plus": EtherPlusSettings,
    "lora": LoraSettings,
}

if TYPE_CHECKING:
    AdapterSettings = MethodSettings
    OptionalAdapterSettings = MethodSettings | NoAdapterSettings
else:  # one of the table's entries, told by its `method`
    _entries = tuple(METHODS.values())
    AdapterSettings = Annotated[Union[_entries], Field(discriminator="method")]  # noqa: UP007
    OptionalAdapterSettings = Annotated[Union[(*_entries, NoAdapterSettings)], Field(discriminator="method")]


def method_title(config: PeftConfig) -> str:
    """The method's name for people."""
    if isinstance(config, EtherConfig):
        return "ETHER" if config.variant == "ether" else "ETHER+"
    kind = config.peft_type
    return {"LORA": "LoRA"}.get(str(getattr(kind, "value", kind)), str(getattr(kind, "value", kind)))

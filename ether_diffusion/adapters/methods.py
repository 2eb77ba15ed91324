"""The table of fine-tuning methods: each entry has its typed settings, its default rates and its PEFT config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union

from peft import PeftConfig
from pydantic import Field, PositiveInt

from ether_diffusion.ether import EtherConfig

from .method_settings import MethodSettings
from .own_methods import MagnitudeSettings, NaiveSettings
from .peft_methods import (
    BoftSettings,
    DeloraSettings,
    DoraSettings,
    HraSettings,
    LoraSettings,
    OftSettings,
    VeraSettings,
)
from .targets import target_modules
from .whole_module_methods import ControlNetSettings, FullSettings, NoAdapterSettings


class _Ether(MethodSettings):
    num_blocks: PositiveInt = 1
    sides_pattern: dict[str, Literal["in", "both"]] = Field(default={})
    blocks_pattern: dict[str, PositiveInt] = Field(default={})
    peft_type: ClassVar[str] = "ETHER"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.20271"
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

    @classmethod
    def made(cls, config: PeftConfig) -> bool:
        return super().made(config) and getattr(config, "variant", None) == "ether"

    @property
    def starts_at_base(self) -> bool:
        return False

    def peft_config(self) -> PeftConfig:
        return self._config("ether", self.sides)


class EtherPlusSettings(_Ether):
    """ETHER+, H+ = I - u u^T + v v^T, on the layer's input and output."""

    title: ClassVar[str] = "ETHER+"
    method: Literal["ether_plus"] = "ether_plus"
    sides: Literal["in", "both"] = "both"

    @classmethod
    def made(cls, config: PeftConfig) -> bool:
        return super().made(config) and getattr(config, "variant", None) == "ether_plus"

    def peft_config(self) -> PeftConfig:
        return self._config("ether_plus", self.sides)


METHODS: dict[str, type[MethodSettings]] = {
    "ether": EtherSettings,
    "ether_plus": EtherPlusSettings,
    "oft": OftSettings,
    "naive": NaiveSettings,
    "magnitude": MagnitudeSettings,
    "lora": LoraSettings,
    "dora": DoraSettings,
    "boft": BoftSettings,
    "hra": HraSettings,
    "vera": VeraSettings,
    "delora": DeloraSettings,
    "full": FullSettings,
    "controlnet": ControlNetSettings,
    "none": NoAdapterSettings,
}

if TYPE_CHECKING:
    AdapterSettings = MethodSettings
else:  # one of the table's entries, told by its `method`
    AdapterSettings = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007


def method_title(config: PeftConfig) -> str:
    """The method's name for people; of one that is not in the table, PEFT's."""
    method = method_of(config)
    kind = config.peft_type
    return method.title if method else str(getattr(kind, "value", kind))


def folder_of(method: object) -> str:
    """What of a run folder holds a method's weights, by its name in a config: "" of `none`; of others, an adapter's."""
    return METHODS[method].folder if isinstance(method, str) and method in METHODS else MethodSettings.folder


def method_of(config: PeftConfig) -> type[MethodSettings] | None:
    """The table's entry that a PEFT config is one of."""
    return next((method for method in METHODS.values() if method.made(config)), None)

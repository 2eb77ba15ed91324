"""Methods that PEFT has: their settings, in the paper's terms, as PEFT's configs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from peft import LoraConfig, PeftConfig
from pydantic import Field, PositiveInt

from .method_settings import MethodSettings
from .targets import target_modules


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

"""Methods of the paper's comparison that PEFT lacks, by this package's own tuners: their settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from peft import PeftConfig
from pydantic import Field, PositiveInt

from ether_diffusion.tuners import MagnitudeConfig, NaiveConfig, TunerPeftType

from .method_settings import MethodSettings
from .targets import target_modules


class NaiveSettings(MethodSettings):
    """Naive: OFT without orthogonality, free block-diagonal matrices on the layer's input."""

    title: ClassVar[str] = "Naive"
    peft_type: ClassVar[str] = TunerPeftType.NAIVE.value
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.20271"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-5, "controllable": 1e-5}
    method: Literal["naive"] = "naive"
    num_blocks: PositiveInt = 4
    blocks_pattern: dict[str, PositiveInt] = Field(default={})

    def peft_config(self) -> PeftConfig:
        return NaiveConfig(
            num_blocks=self.num_blocks,
            blocks_pattern=dict(self.blocks_pattern),
            target_modules=target_modules(self.target),
        )


class MagnitudeSettings(MethodSettings):
    """One scale for each row of the layers' weights: as a second phase, of weights that an adapter has changed."""

    title: ClassVar[str] = "Magnitude"
    peft_type: ClassVar[str] = TunerPeftType.MAGNITUDE.value
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 1e-5, "controllable": 1e-5}
    method: Literal["magnitude"] = "magnitude"
    after: Path | None = None
    """A run, a checkpoint or a PEFT folder, whose adapter is merged into the base first; null: the base as it is."""
    target: str | list[str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    """As for other methods; null: the layers of the adapter before, or `attention` where there is none."""

    def peft_config(self) -> PeftConfig:
        return MagnitudeConfig(target_modules=target_modules(self.target or "attention"))

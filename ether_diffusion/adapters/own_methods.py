"""Methods that PEFT lacks, by this package's own tuners: ETHER, ETHER+, Naive and magnitudes. Their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ether_diffusion.ether import EtherPeftType
from ether_diffusion.limits import Blocks
from ether_diffusion.tuners import TunerPeftType

from .method_settings import MethodSettings


class _Ether(MethodSettings):
    num_blocks: Blocks = 1
    sides_pattern: dict[str, Literal["in", "both"]] = Field(default={})
    blocks_pattern: dict[str, Blocks] = Field(default={})
    peft_type = EtherPeftType.ETHER.value
    packs = True
    paper = "https://arxiv.org/abs/2405.20271"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}
    peft_names: ClassVar[dict[str, str]] = {
        name: name for name in ("num_blocks", "sides", "sides_pattern", "blocks_pattern")
    }

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        return layer.low_rank(name)


class EtherSettings(_Ether):
    """ETHER, H = I - 2 u u^T, on the layer's input."""

    title = "ETHER"
    peft_variant: ClassVar[dict[str, Any]] = {"variant": "ether"}
    method: Literal["ether"] = "ether"
    sides: Literal["in", "both"] = "in"

    @property
    def starts_at_base(self) -> bool:
        return False


class EtherPlusSettings(_Ether):
    """ETHER+, H+ = I - u u^T + v v^T, on the layer's input and output."""

    title = "ETHER+"
    peft_variant: ClassVar[dict[str, Any]] = {"variant": "ether_plus"}
    own_keys = "*.v"
    method: Literal["ether_plus"] = "ether_plus"
    sides: Literal["in", "both"] = "both"


class NaiveSettings(MethodSettings):
    """Naive: OFT without orthogonality, free block-diagonal matrices on the layer's input."""

    title = "Naive"
    peft_type = TunerPeftType.NAIVE.value
    paper = "https://arxiv.org/abs/2405.20271"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-5, "controllable": 1e-5}
    peft_names: ClassVar[dict[str, str]] = {"num_blocks": "num_blocks", "blocks_pattern": "blocks_pattern"}
    method: Literal["naive"] = "naive"
    num_blocks: Blocks = 4
    blocks_pattern: dict[str, Blocks] = Field(default={})


class MagnitudeSettings(MethodSettings):
    """One scale for each row of the layers' weights, also for weights that another adapter has changed: `after`."""

    title = "Magnitude"
    peft_type = TunerPeftType.MAGNITUDE.value
    paper = "https://arxiv.org/abs/2306.07280"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 1e-5, "controllable": 1e-5}
    method: Literal["magnitude"] = "magnitude"
    after: Path | None = None
    """A run, a checkpoint or a PEFT folder whose adapter is merged into the base first; null: the base as it is."""
    target: str | list[str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    """As for other methods; null: the layers of the adapter in `after`, or `attention` without one."""

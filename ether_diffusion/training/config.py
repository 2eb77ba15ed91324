"""What the configs of all tasks have in common: the base, the adapter, the run's folder and seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator, model_validator

from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.config import Settings, at_home
from ether_diffusion.models.bases import DEFAULT_BASE
from ether_diffusion.models.quantized import Quantization

from .settings import TrainingSettings


def between_methods(old: str, new: str) -> Collection[str]:
    """The settings of an adapter that hold for another method as well: which layers, where both adapt layers."""
    adapted = [name in METHODS and METHODS[name].peft_type for name in (old, new)]
    return {"target", "text_encoder"} if all(adapted) else ()


class TaskConfig(Settings):
    """Everything that a run depends on. Each task says what its `adapter`, `data` and `validation` may be."""

    carried_over: ClassVar[Mapping[str, Callable[[str, str], Collection[str]]]] = {"adapter.method": between_methods}

    base_model: str = DEFAULT_BASE
    """A hub name, a folder in diffusers' layout, a single file of Stable Diffusion v1, or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    vae: str | None = None
    """Another VAE than the base's own: a folder, a hub name, or a single file."""
    allow_pickle: bool = False
    """Let a `.ckpt` run code of its own while it is read, where it holds more than tensors."""
    quantization: Quantization | None = None
    """Keep the UNet's frozen linear layers in four or eight bits; null: in the precision of training."""
    output_dir: Path
    seed: int = 0
    adapter: Any
    data: Any
    training: TrainingSettings
    validation: Any

    @field_validator("base_model", "vae", mode="after")
    @classmethod
    def _name_or_path(cls, value: str | None) -> str | None:
        return str(at_home(Path(value))) if value and value.startswith("~") else value

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TaskConfig:
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError("training: give either steps or epochs; the other one is null, as in training.steps=null")
        return self

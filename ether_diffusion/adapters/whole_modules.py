"""Methods that train whole modules in the place of adapters: the UNet, or a ControlNet beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from .method_settings import MethodSettings


class WholeModuleSettings(MethodSettings):
    """What methods have whose weights are no PEFT adapter: there is nothing to attach, and nothing to merge."""

    trains: ClassVar[str]
    """What is trained, for people."""

    init_from: Path | None = None
    """A saved run of the same method, or the folder of its module, whose weights are the starting point."""
    text_encoder: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen

    @field_validator("target", mode="before", check_fields=False)
    @classmethod
    def _everything(cls, target: Any) -> Any:
        if target != cls.model_fields["target"].default:
            whole = cls.model_fields["target"].default
            raise ValueError(f"{target!r}, but {cls.trains} is trained, all of it; leave it out, or write {whole}")
        return target

    @field_validator("text_encoder", mode="before")
    @classmethod
    def _no_text_encoder(cls, value: Any) -> Any:
        if value is not False:
            raise ValueError(f"{value!r}, but {cls.trains} alone is trained; leave it out")
        return value


class FullSettings(WholeModuleSettings):
    """Full fine-tuning of the UNet: the paper's row "DreamBooth" (arXiv 2208.12242, its text encoder frozen)."""

    title: ClassVar[str] = "full fine-tuning"
    trains: ClassVar[str] = "the UNet"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 5e-6}
    method: Literal["full"] = "full"
    target: Literal["unet"] = "unet"  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen


class ControlNetSettings(WholeModuleSettings):
    """ControlNet (arXiv 2302.05543), by diffusers: a trained copy of the UNet's first half sees the condition.

    The learning rate is the one of its authors' code.
    """

    title: ClassVar[str] = "ControlNet"
    trains: ClassVar[str] = "a ControlNet"
    learning_rates: ClassVar[dict[str, float]] = {"controllable": 1e-5}
    method: Literal["controlnet"] = "controlnet"
    target: Literal["controlnet"] = "controlnet"  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen

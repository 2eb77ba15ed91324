"""Methods without an adapter: they train the whole UNet, or only a module that works with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from .method_settings import MethodSettings


class WithoutAdapterSettings(MethodSettings):
    """A method whose weights are no PEFT adapter: there is nothing to attach, and nothing to merge."""

    trains: ClassVar[str]
    """What is trained, for people."""
    merges = False

    text_encoder: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen

    @field_validator("target", "text_encoder", mode="before", check_fields=False)
    @classmethod
    def _nothing_to_choose(cls, value: Any, field: ValidationInfo) -> Any:
        whole = cls.model_fields[field.field_name or ""].default
        if value != whole:
            rule = f"{cls.trains} is trained, all of it and nothing else"
            raise ValueError(f"{value!r}, but {rule}; leave it out, or write {json.dumps(whole)}")
        return value


class WholeModuleSettings(WithoutAdapterSettings):
    """A method whose weights are as large as the base's."""

    init_from: Path | None = None
    """A saved run of the same method, or the folder of its module, whose weights are the starting point."""


class FullSettings(WholeModuleSettings):
    """Full fine-tuning of the UNet: the paper's row "DreamBooth" (arXiv 2208.12242, its text encoder frozen)."""

    title = "full fine-tuning"
    trains = "the UNet"
    folder = "unet"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 5e-6}
    method: Literal["full"] = "full"
    target: Literal["unet"] = "unet"  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen


class ControlNetSettings(WholeModuleSettings):
    """ControlNet (arXiv 2302.05543), by diffusers: a trained copy of the UNet's first half gets the condition.

    The learning rate is the one of its authors' code.
    """

    title = "ControlNet"
    has_scale = False  # `condition_scale` is the strength of what it adds
    trains = "a ControlNet"
    folder = "controlnet"
    learning_rates: ClassVar[dict[str, float]] = {"controllable": 1e-5}
    method: Literal["controlnet"] = "controlnet"
    target: Literal["controlnet"] = "controlnet"  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen


class NoAdapterSettings(WithoutAdapterSettings):
    """No adapter: the base stays as it is, and only the condition encoder is trained."""

    title = "none"
    trains = "the condition encoder"
    folder = ""
    learning_rates: ClassVar[dict[str, float]] = {"controllable": 1e-4}
    method: Literal["none"] = "none"
    target: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    init_from: Path | None = None
    """A saved controllable run, whose condition encoder is the starting point."""

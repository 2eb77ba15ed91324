"""What the settings of all fine-tuning methods share, and the facts that the package needs to know of a method."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import field_validator
from torch import Tensor, nn

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import is_packed

from .targets import resolved_target, target_modules


class MethodSettings(Settings):
    """A method: its settings are fields, its facts class variables. The table of methods holds subclasses of this.

    A subclass has a field `method` with one `Literal`, the name in configs, and states `title` and `learning_rates`. If
    it trains a PEFT adapter, it states `peft_type` and `peft_names`. The other facts have defaults.
    """

    title: ClassVar[str]
    """The method's name for people."""
    paper: ClassVar[str] = ""
    """Where the method was published."""
    learning_rates: ClassVar[dict[str, float]]
    """Defaults by task, the paper's where it has one. A task that is missing cannot be trained with this method."""
    peft_type: ClassVar[str] = ""
    """PEFT's name of the method. Empty: the weights are no PEFT adapter."""
    peft_names: ClassVar[dict[str, str]] = {}
    """The settings that are passed to PEFT's config, besides `target`: the names that they have there, by ours."""
    peft_values: ClassVar[dict[str, Any]] = {}
    """Other values of PEFT's config."""
    peft_variant: ClassVar[dict[str, Any]] = {}
    """And those that distinguish this method's configs from others of its `peft_type`."""
    folder: ClassVar[str] = "adapter"
    """The subfolder of a run that holds the method's weights. Empty: it has none."""

    has_scale: ClassVar[bool] = True
    """Its strength can be set from 0 (the base) to 1 (as trained). Otherwise it is in the model or left out."""
    merges: ClassVar[bool] = True
    """It can be written into the base's weights."""
    sequential_offload: ClassVar[bool] = True
    """It runs when accelerate offloads layer by layer: a weight is loaded when the module that owns it is called, so a
    method must not read weights of modules that it does not call."""
    convolutions: ClassVar[Literal["all", "square", "1x1", "none"]] = "all"
    """The convolutions that it can adapt, by kernel; `square` and `1x1` also exclude groups and dilation."""
    refused_weights: ClassVar[Literal["none", "torchao", "quantised"]] = "none"
    """Frozen weights that it cannot adapt: torchao's, or all quantised ones, since it computes with stored numbers."""
    keeps_fp32: ClassVar[bool] = False
    """Its parameters stay in fp32 on a base in half precision, because a rounded rotation is none."""
    packs: ClassVar[bool] = False
    """Runs of it can train in one batch: the samples of a batch can each have an adapter of their own."""
    own_keys: ClassVar[str] = ""
    """Pattern of keys in its file that no other method of its `peft_type` has; empty: it has none."""
    frozen_keys: ClassVar[tuple[str, ...]] = ()
    """Patterns (`*` matches any text) of the keys in its file whose tensors are not trained."""

    method: Any = None
    target: str | list[str] = "attention"
    """A preset (attention, attention+geglu, attention+mlp, linear, all), a list of names or endings, or a regular
    expression. What a preset stands for depends on the model: `presets.py`."""
    init_from: Path | None = None
    """A saved adapter of the same method and shape, or a run folder, whose weights are the starting point."""

    text_encoder: bool = False
    """Put an adapter of the same settings on the text encoder's attention, too."""

    @field_validator("target", "sides_pattern", "blocks_pattern", check_fields=False)
    @classmethod
    def _regular_expressions(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @property
    def starts_at_base(self) -> bool:
        """Whether an adapter that has not been trained leaves the model's outputs as they are."""
        return True

    def for_text_encoder(self) -> MethodSettings:
        """The same settings with the text encoder's attention as target."""
        patterns = {name: {} for name in ("sides_pattern", "blocks_pattern") if name in type(self).model_fields}
        return self.model_copy(update={"target": ["q_proj", "k_proj", "v_proj", "out_proj"], **patterns})

    def for_model(self, model: nn.Module) -> Self:
        """The same settings with the layers that the target's preset stands for in this model.

        Raises:
            UserError: the model has no such preset.
        """
        target = None if self.target is None else resolved_target(self.target, model)
        return self if target is None else self.model_copy(update={"target": target})

    def peft_config(self) -> PeftConfig:
        """These settings as PEFT's config of the method, for a UNet or, from `for_model`, for another model."""
        target = "attention" if self.target is None else self.target
        values = {theirs: getattr(self, ours) for ours, theirs in self.peft_names.items()}
        kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]  # pyright: ignore[reportArgumentType] - a string enum
        return kind(**values, **self.peft_values, **self.peft_variant, target_modules=target_modules(target))

    @classmethod
    def recognises(cls, config: PeftConfig) -> bool:
        """Whether a PEFT config belongs to this method."""
        same = all(getattr(config, key, None) == value for key, value in cls.peft_variant.items())
        return bool(cls.peft_type) and cls.peft_type == peft_type_of(config) and same

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        """Why this method, whatever its settings, cannot adapt a weight stored like this layer's; None: it can."""
        weight: Any = layer.weight
        if cls.refused_weights == "quantised" and is_packed(layer):
            return "its weight is quantised, and the method computes with it"
        if cls.refused_weights == "torchao" and type(weight.data) is not Tensor:
            return "torchao quantised it, and PEFT's layers of this method cannot use such weights"
        return None

    def layer_problem(self, layer: nn.Module) -> str | None:
        """Why this method cannot adapt a layer, as a clause after the layer's name; None: it can."""
        conv: Any = layer
        if not isinstance(layer, nn.Conv2d) or self.convolutions == "all":
            return None
        if self.convolutions == "none":
            return f"it is a {type(layer).__name__}; only linear layers are allowed"
        if self.convolutions == "1x1" and layer.kernel_size != (1, 1):
            kernel = "x".join(map(str, layer.kernel_size))
            return f"it is a {kernel} convolution; only linear layers and 1x1 convolutions are allowed"
        if layer.groups != 1 or layer.dilation != (1, 1):
            return "it is a convolution with groups or dilation"
        sides = len({*conv.kernel_size}), len({*conv.padding})
        return None if sides == (1, 1) else "its kernel or padding is not square"

    def after_attach(self, model: nn.Module, name: str) -> None:
        """Called when the adapter `name` has been attached to a model, to set what PEFT's config cannot."""

    @classmethod
    def project(cls, model: nn.Module, name: str) -> None:
        """Project an adapter's weights onto its constraint, as the next forward pass would; called before saving."""

    @classmethod
    def shared_tensors(cls, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Tensors that all layers of an adapter share, by PEFT's file keys. `model.state_dict()` lacks them."""
        return {}

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        """The change of a layer's weight W by an adapter alone, in closed form: factors (B, A), B @ A = W' - W.

        Returns:
            B (out, rank), A (rank, in) or (rank, in, kh, kw); None: this method's change has no low rank.
        """
        return None

    @classmethod
    def is_trained(cls, key: str) -> bool:
        """Whether a tensor of a saved adapter, by PEFT's file key, is trained."""
        return not any(fnmatchcase(key, pattern) for pattern in cls.frozen_keys)


def peft_type_of(config: PeftConfig) -> str:
    """PEFT's name of a config's method, as text."""
    kind: Any = config.peft_type
    return str(getattr(kind, "value", kind))


def learning_rate(method: Any, task: str) -> float:
    """A method's default learning rate for a task.

    Args:
        method: Settings of a method, with `method` and `learning_rates`.

    Raises:
        UserError: the method does not serve this task; names those that it does.
    """
    if task not in method.learning_rates:
        others = ", ".join(method.learning_rates) or "no task"
        raise UserError(f"adapter.method: {method.method!r} is not for {task}; it is for: {others}.")
    return method.learning_rates[task]

"""What the settings of every fine-tuning method have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError


class MethodSettings(Settings):
    """What every method has."""

    # Learning rates by task, the paper's where it has one. A task that is not in it cannot be trained with this method.
    learning_rates: ClassVar[dict[str, float]]
    title: ClassVar[str]
    # PEFT's name of the method, in `peft_type`. Empty: nothing of PEFT.
    peft_type: ClassVar[str] = ""
    # Where the method was published.
    paper: ClassVar[str] = ""
    # Of a run folder, what holds the method's weights. Empty: it has none.
    folder: ClassVar[str] = "adapter"

    method: Any = None
    target: str | list[str] = "attention"
    """A preset (attention, attention+geglu, linear, all), a list of names or endings, or a regular expression."""
    init_from: Path | None = None
    """A saved adapter of the same method and shape, or a run folder, whose weights are the starting point."""

    text_encoder: bool = False
    """Put an adapter of the same settings on the text encoder's attention, too."""

    @classmethod
    def made(cls, config: PeftConfig) -> bool:
        """Whether a PEFT config is one of this method."""
        kind = config.peft_type
        return bool(cls.peft_type) and cls.peft_type == getattr(kind, "value", kind)

    @property
    def starts_at_base(self) -> bool:
        """Whether an adapter that has not been trained leaves the model's outputs as they are."""
        return True

    def for_text_encoder(self) -> MethodSettings:
        """The same settings with the text encoder's attention as target."""
        patterns = {name: {} for name in ("sides_pattern", "blocks_pattern") if name in type(self).model_fields}
        return self.model_copy(update={"target": ["q_proj", "k_proj", "v_proj", "out_proj"], **patterns})

    def peft_config(self) -> PeftConfig:
        raise NotImplementedError

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        """Why this method, whatever its settings, cannot be put on how a layer keeps its weight; else None."""
        return None

    def layer_problem(self, layer: nn.Module) -> str | None:
        """Why this method cannot adapt a layer, in words that follow the layer's name; None: it can."""
        return None

    def after_attach(self, model: nn.Module, name: str) -> None:
        """What remains to be set in a model that the adapter `name` was just put into, for training it."""


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

"""What the settings of every fine-tuning method have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from ether_diffusion.config import Settings


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

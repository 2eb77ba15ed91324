"""The config of a controllable run, and the defaults that depend on other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ether_diffusion.adapters.methods import AdapterSettings, EtherPlusSettings
from ether_diffusion.config import Settings
from ether_diffusion.generation import ControllableSampling
from ether_diffusion.limits import PositiveStrength, Seed, Share, Side, Steps, Strength
from ether_diffusion.models.saved_modules import CONTROLNET

from .config import TaskConfig, TrainingSettings, resolve_training

NAME = "controllable"
TARGET = "attention+geglu"
"""The paper's: q, k, v, output projection "and the subsequent feed-forward layer"."""


class DataSettings(Settings):
    """The pairs, and how samples are made from them."""

    dataset_dir: str
    """ADEChallengeData2016, a folder of pairs or of photos, or `builtin:scenes`: see docs/controllable.md."""
    split: str = "training"
    condition: str = "auto"
    """`labels`, `image`, or a preprocessor that makes conditions from the images: `canny`, `hed`, …; `auto`: decided
    by the files."""
    captions: Path | None = None
    """JSON lines, or a folder of text files; null: the data set's own."""
    caption_template: str | None = None
    """For images without a caption: `a photo of a {scene}`."""
    limit: Steps | None = None
    """Use only this many pairs, the first by name."""
    resolution: Side = 512
    """Side of the square crops in pixels; a multiple of 8."""
    crop: Literal["center", "random"] = "center"
    horizontal_flip: bool = False
    caption_dropout: Share = 0.0
    """Probability that a sample's prompt is empty, for guidance. Its condition stays."""
    cache: bool = False
    """Encode the images once and keep them on disk; the VAE then leaves memory. Needs `crop: center`."""
    cache_dir: Path | None = None
    """Where `builtin:scenes`, conditions made from images and encoded images are kept; default:
    `~/.cache/ether_diffusion`."""


class ControllableTrainingSettings(TrainingSettings):
    """Optimisation, precision, checkpoints."""

    encoder_learning_rate: Strength | None = None
    """The condition encoder's. Default: `learning_rate`, but at most `max_encoder_learning_rate`."""
    max_encoder_learning_rate: PositiveStrength = 1e-4
    """The bound of that default, the paper's. Much shorter runs need a higher one."""


class ControllableValidationSettings(Settings):
    """Images generated during training from the conditions of some pairs, always with the same seeds."""

    images: Annotated[int, Field(ge=0, le=10**4)] = 4
    """How many pairs, the first by name; 0: none."""
    split: str | None = None
    """The split that the pairs come from. Default: `validation` if the data set has it, else the training split."""
    captions: Path | None = None
    """For that split, as `data.captions`; null: the data set's own."""
    prompts: tuple[str, ...] = ()
    """Use these in turn instead of the pairs' own captions."""
    every: Steps = 200
    """Steps between validations. The first one is before training, the last one after it."""
    seed: Seed = 0
    sampling: ControllableSampling = ControllableSampling()

    @property
    def enabled(self) -> bool:
        """Whether images are generated during training at all."""
        return bool(self.images)


class ControllableConfig(TaskConfig):
    """All settings of a controllable run."""

    adapter: AdapterSettings = EtherPlusSettings(target=TARGET)
    """`method: none` trains the condition encoder alone; `controlnet` trains a ControlNet instead of both."""
    data: DataSettings
    training: ControllableTrainingSettings  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    validation: ControllableValidationSettings = ControllableValidationSettings()

    @model_validator(mode="after")
    def _check_text_encoder(self) -> ControllableConfig:
        if self.adapter.text_encoder:
            raise ValueError("adapter.text_encoder: true, but a controllable run leaves the text encoder as it is")
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> ControllableConfig:
        if self.data.cache and self.data.crop == "random":
            raise ValueError("data.cache: true, but crops at random places cannot be cached; take data.crop=center")
        return self

    @model_validator(mode="after")
    def _check_encoder_rate(self) -> ControllableConfig:
        rate, training = self.training.encoder_learning_rate, self.training
        if rate is None:
            return self
        reason = None
        if self.trains_controlnet:
            reason = "a ControlNet has one rate for all of it"
        elif self.freezes_encoder:
            reason = "adapter.after freezes the encoder"
        elif training.optimizer == "prodigy" and rate != training.learning_rate:
            reason = "prodigy finds one rate for all"
        if reason is not None:
            raise ValueError(f"training.encoder_learning_rate: {reason}; leave it out")
        return self

    @property
    def freezes_encoder(self) -> bool:
        """Whether the condition encoder is the previous run's, frozen."""
        return getattr(self.adapter, "after", None) is not None

    @property
    def trains_controlnet(self) -> bool:
        """Whether a ControlNet is trained, instead of a condition encoder and an adapter."""
        return self.adapter.folder == CONTROLNET.folder


def resolve(config: ControllableConfig) -> ControllableConfig:
    """Fill in the defaults that depend on other settings: learning rates, checkpoints to keep, the adapter's target.

    Raises:
        UserError: the method does not serve this task.
    """
    adapter = config.adapter
    if adapter.peft_type and not config.freezes_encoder and "target" not in adapter.model_fields_set:
        adapter = adapter.model_copy(update={"target": TARGET})
    training = resolve_training(adapter, config.training, NAME)
    has_own_rate = not config.trains_controlnet and not config.freezes_encoder
    if training.encoder_learning_rate is None and has_own_rate:
        rate = training.learning_rate
        assert rate is not None
        if training.optimizer != "prodigy":
            rate = min(rate, training.max_encoder_learning_rate)
        training = training.model_copy(update={"encoder_learning_rate": rate})
    return config.model_copy(update={"training": training, "adapter": adapter})

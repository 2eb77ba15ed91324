"""The configs of all tasks: base, adapter, optimisation, checkpoints, validation; a task adds its data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from ether_diffusion.adapters.method_settings import MethodSettings, learning_rate
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.config import Settings, at_home, unquoted
from ether_diffusion.generation import Sampling
from ether_diffusion.hub import check_repository
from ether_diffusion.limits import Bound, Count, PositiveStrength, Seed, ShareBelowAll, Steps, Strength
from ether_diffusion.models.bases import DEFAULT_BASE
from ether_diffusion.models.quantized import Quantization
from ether_diffusion.models.saved_modules import CONTROLNET, UNET

PRODIGY_RATE = 0.1
"""Prodigy multiplies the rate that it finds by ours: a factor below this is a rate meant for another optimiser."""
T = TypeVar("T", bound="TrainingSettings")


class TrainingSettings(Settings):
    """Optimisation, precision, checkpoints."""

    steps: Steps | None = None
    """Optimiser steps. Give this or `epochs`."""
    epochs: Steps | None = None
    """Passes over the data, in place of `steps`."""
    learning_rate: Strength | None = None
    """Default: the paper's rate for the method."""
    batch_size: Count = 1
    """Samples per process and forward pass. With prior preservation each is paired with a class image."""
    gradient_accumulation: Count = 1
    """Forward passes per optimiser step. Samples per step: batch_size x gradient_accumulation x processes."""

    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = "adamw"
    """`adamw_8bit` needs bitsandbytes, `prodigy` prodigyopt. Prodigy finds its rate and multiplies it by
    `learning_rate`, whose default is then 1."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Optimiser steps of linear warm-up, with any schedule and any number of processes."""
    betas: tuple[ShareBelowAll, ShareBelowAll] = (0.9, 0.999)
    weight_decay: Strength = 1e-2
    epsilon: PositiveStrength = 1e-8
    max_grad_norm: Bound | None = 1.0
    """Clip gradients to this norm; null: no clipping."""

    min_snr_gamma: Bound | None = None
    """Weight each sample's loss by min(SNR, gamma) / SNR (arXiv 2303.09556; 5 is usual); null: all weights are 1."""
    noise_offset: Strength = 0.0
    """Add this much of a constant per channel to the noise, for darker darks and lighter lights; about 0.1."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Save and validate an average of the trained weights with this decay, such as 0.999; null: the last weights."""

    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, unquoted("no")] = None
    """Precision of the frozen base; trained weights stay fp32. Default: the setting of `accelerate launch`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the UNet's transformer blocks: the first step takes a minute or more, each later one less time."""
    workers: Annotated[int, Field(ge=0, le=512)] = 0
    """Processes that load data."""
    log_every: Steps | None = None
    """Steps between reads of losses and norms from the device; `metrics.jsonl` has every step all the same. Default: 10
    on an accelerator, 1 on the CPU."""
    profile: Count | None = None
    """Write a trace of this many steps, from the third on, to `logs/`; null: none."""

    checkpoint_every: Steps = 200
    """Steps between checkpoints. The last step always has one."""
    keep_states: Steps = 2
    """Keep the optimiser states of this many of the last checkpoints."""
    keep_checkpoints: Steps | None = None
    """Keep this many of the last checkpoints. Default: all; for methods that save whole modules, `keep_states`."""
    require_certificate: bool = True
    """End with exit code 2 where the trained weights fail their certificate, though they are saved; false: for controls
    that are meant to do nothing, as with a learning rate of 0."""
    resume: bool | str = False
    """`true` or `latest`: resume from the last checkpoint in output_dir, if there is one; or a checkpoint's folder."""
    allow_cpu: bool = False
    """Train on the CPU although the launch config asks for a GPU and none can be used."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    @model_validator(mode="after")
    def _check_prodigy_factor(self) -> TrainingSettings:
        rate = self.learning_rate
        if self.optimizer == "prodigy" and rate is not None and 0 < rate < PRODIGY_RATE:
            raise ValueError(
                f"training.learning_rate: {rate:g}, but prodigy finds its rate and multiplies it by this; give null, "
                f"which is 1, or at least {PRODIGY_RATE:g}"
            )
        return self


class ValidationSettings(Settings):
    """Images generated from prompts during training, always with the same seeds."""

    prompts: tuple[str, ...] = ()
    every: Steps = 200
    """Steps between validations. The first one is before training, the last one after it."""
    images_per_prompt: Count = 2
    seed: Seed = 0
    sampling: Sampling = Sampling()

    @property
    def enabled(self) -> bool:
        """Whether images are generated during training at all."""
        return bool(self.prompts)


def shared_by_methods(old: str, new: str) -> Collection[str]:
    """The adapter settings that keep their values when an override changes the method, if both methods adapt layers."""
    adapts_layers = [name in METHODS and METHODS[name].peft_type for name in (old, new)]
    return {"target", "text_encoder"} if all(adapts_layers) else ()


class TaskConfig(Settings):
    """All settings of a run. Each task declares the types of its `adapter`, `data` and `validation`."""

    carried_over: ClassVar[Mapping[str, Callable[[str, str], Collection[str]]]] = {"adapter.method": shared_by_methods}

    base_model: str = DEFAULT_BASE
    """A hub name, a folder in diffusers' layout, a single file of Stable Diffusion v1, or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    vae: str | None = None
    """A VAE to use in place of the base's own: a folder, a hub name, or a single file."""
    allow_pickle: bool = False
    """Allow a `.ckpt` that holds more than tensors, which can run any code when it is read."""
    quantization: Quantization | None = None
    """Keep the UNet's frozen linear layers in four or eight bits; null: in the precision of training."""
    output_dir: Path
    push_to_hub: str | None = None
    """Publish the adapter in the end, as USER/NAME of the Hugging Face hub. `ether-diffusion push` does so later."""
    hub_private: bool = False
    """Make that repository private."""
    seed: Seed = 0
    adapter: Any
    data: Any
    training: TrainingSettings
    validation: Any

    @property
    def trains_unet(self) -> bool:
        """Whether the whole UNet is trained, instead of an adapter in it."""
        return self.adapter.folder == UNET.folder

    @field_validator("base_model", "vae", mode="after")
    @classmethod
    def _name_or_path(cls, value: str | None) -> str | None:
        return str(at_home(Path(value))) if value and value.startswith("~") else value

    @model_validator(mode="after")
    def _check_steps_or_epochs(self) -> TaskConfig:
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError("training: give either steps or epochs; the other one is null, as in training.steps=null")
        return self

    @model_validator(mode="after")
    def _check_hub(self) -> TaskConfig:
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "push_to_hub:")
            if not self.adapter.peft_type:
                raise ValueError(f"push_to_hub: {self.push_to_hub}, but adapter.method: {self.adapter.method} has none")
        return self

    @model_validator(mode="after")
    def _check_full_precision(self) -> TaskConfig:
        if self.trains_unet and self.quantization is not None:
            raise ValueError(f"quantization: {self.quantization}, but adapter.method: full trains those weights")
        return self


def resolve_training(adapter: MethodSettings, training: T, task: str) -> T:
    """Training settings with the defaults that depend on the method: the learning rate and the checkpoints to keep.

    Raises:
        UserError: the method does not serve this task.
    """
    rate, updates = learning_rate(adapter, task), {}
    if training.learning_rate is None:
        updates["learning_rate"] = 1.0 if training.optimizer == "prodigy" else rate
    if training.keep_checkpoints is None and adapter.folder in (UNET.folder, CONTROLNET.folder):
        updates["keep_checkpoints"] = training.keep_states  # whole modules would fill a disk
    return training.model_copy(update=updates)

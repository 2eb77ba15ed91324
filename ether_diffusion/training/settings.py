"""Settings that every training task shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ether_diffusion.config import Settings
from ether_diffusion.generation import Sampling

PRODIGY_RATE = 0.1
"""Less than this of the rate that Prodigy finds is a rate of another optimiser, given by mistake."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingSettings(Settings):
    """Optimisation, precision, checkpoints."""

    steps: PositiveInt | None = None
    """Optimiser steps. Give this or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the data, in place of `steps`."""
    learning_rate: NonNegativeFloat | None = None
    """Default: the paper's rate of the method."""
    batch_size: PositiveInt = 1
    """Samples a process and forward pass. With prior preservation each brings a class sample along."""
    gradient_accumulation: PositiveInt = 1
    """Forward passes an optimiser step. Samples a step: batch_size x gradient_accumulation x processes."""

    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = "adamw"
    """`adamw_8bit` needs bitsandbytes, `prodigy` prodigyopt. Prodigy finds its rate and multiplies it by
    `learning_rate`, whose default is then 1."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up, with any schedule and any number of processes."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-2
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm; null: never."""

    min_snr_gamma: PositiveFloat | None = None
    """Weigh each sample's loss by min(SNR, gamma) / SNR (arXiv 2303.09556; 5 is usual); null: all alike."""
    noise_offset: NonNegativeFloat = 0.0
    """Add this much of a constant per channel to the noise, for darker darks and lighter lights; about 0.1."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Save and draw with an average of the trained weights of this decay (0.999, say); null: with the last ones."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen base; trained weights stay fp32. Default: what `accelerate launch` was told."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    workers: NonNegativeInt = 0
    """Processes that load data."""

    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints. The last step always has one."""
    keep_states: PositiveInt = 2
    """Optimiser states are kept for this many of the last checkpoints."""
    keep_checkpoints: PositiveInt | None = None
    """This many of the last checkpoints are kept. Default: all; of a method that saves whole modules, `keep_states`."""
    resume: bool | str = False
    """`true` or `latest`: go on from the last checkpoint in output_dir, if there is one; or a checkpoint's folder."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    @model_validator(mode="after")
    def _prodigy_is_not_slowed_down(self) -> TrainingSettings:
        rate = self.learning_rate
        if self.optimizer == "prodigy" and rate is not None and 0 < rate < PRODIGY_RATE:
            raise ValueError(
                f"training.learning_rate: {rate:g}, but prodigy finds its rate and multiplies it by this; give null, "
                f"which is 1, or at least {PRODIGY_RATE:g}"
            )
        return self


class ValidationSettings(Settings):
    """Images drawn while training, always from the same seeds."""

    prompts: tuple[str, ...] = ()
    every: PositiveInt = 200
    """Steps between validations. The first one is before training, the last one after it."""
    images_per_prompt: PositiveInt = 2
    seed: int = 0
    sampling: Sampling = Sampling()

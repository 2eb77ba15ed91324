"""How images are sampled: schedulers by short names, and settings with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import diffusers
from pydantic import model_validator

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError
from ether_diffusion.limits import Count, Share, Strength

SchedulerName = Literal["dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"]

# Latents are not bounded by 1. diffusers clips them by default where a base's config does not mention `clip_sample`.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class Sampling(Settings):
    """How an image is sampled. The defaults are the paper's for subject-driven generation."""

    scheduler: SchedulerName = "dpm++"
    steps: Count = 25
    guidance: Strength = 7.5
    """Classifier-free guidance scale; 1 and below: none."""
    negative_prompt: str = ""


class ControllableSampling(Sampling):
    """How an image that follows a condition is sampled. The defaults are the paper's for controllable generation."""

    scheduler: SchedulerName = "ddim"
    steps: Count = 50
    guidance: Strength = 9.0
    condition_scale: Strength = 1.0
    """Strength of the condition, a factor of its features. 0: the condition is ignored."""
    condition_start: Share = 0.0
    condition_end: Share = 1.0
    """The shares of the sampling steps, from 0 to 1, between which the condition is used."""

    @model_validator(mode="after")
    def _check_span(self) -> ControllableSampling:
        if self.condition_start >= self.condition_end:
            raise ValueError(
                f"condition_start = {self.condition_start:g} must be below condition_end = {self.condition_end:g}"
            )
        return self


def check_steps(sampling: Sampling, config: Mapping[str, Any]) -> None:
    """Refuse a number of sampling steps that the scheduler cannot take with a base's noise levels.

    Args:
        config: A scheduler's of the base.

    Raises:
        UserError: names the numbers that it takes.
    """
    least = 1 if sampling.scheduler != "pndm" else 2 if config.get("skip_prk_steps") else 4
    most = config["num_train_timesteps"]
    if not least <= sampling.steps <= most:
        raise UserError(f"steps = {sampling.steps}; {sampling.scheduler} takes {least} to {most} with this base.")


def make_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler by its short name, with the base's noise schedule."""
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(dict(config), **options)

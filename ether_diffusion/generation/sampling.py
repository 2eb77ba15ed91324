"""How images are sampled: schedulers by short names, and settings with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pydantic import model_validator

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError
from ether_diffusion.limits import Count, Share, Strength
from ether_diffusion.models.families.family import Family, FlowMatching
from ether_diffusion.models.families.table import DEFAULT

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


class FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ over the noise levels of flow matching, in any pipeline of flow matching.

    Some pass their own levels, or a shift by the images' size to bases that have a fixed one: neither is used here.
    """

    @classmethod
    def of(cls, own: Mapping[str, Any]) -> FlowDPMSolver:
        """One for a base whose own scheduler has this config, which is kept in its own."""
        shared = {name: own[name] for name in ("num_train_timesteps", "use_dynamic_shifting") if name in own}
        flow: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": own["shift"]}
        made = cls(**shared, **flow)
        others = {name: value for name, value in own.items() if name not in made.config}
        made.register_to_config(**others, flow_matching=dict(own))
        return made

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride] - more arguments
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: Any = None,
    ) -> None:
        steps: Any = num_inference_steps if sigmas is None else len(sigmas)
        super().set_timesteps(steps, device, mu if self.config["use_dynamic_shifting"] else None, timesteps)


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


def check_steps(sampling: Sampling, config: Mapping[str, Any], family: Family = DEFAULT) -> None:
    """Refuse a scheduler that is not for a base's family, and a number of steps that it cannot take with the base.

    Args:
        config: A scheduler's of the base.

    Raises:
        UserError: names the schedulers, or the numbers, that it takes.
    """
    check_scheduler(sampling, config, family)
    least = 1 if sampling.scheduler != "pndm" else 2 if config.get("skip_prk_steps") else 4
    most = config["num_train_timesteps"]
    if not least <= sampling.steps <= most:
        raise UserError(f"steps = {sampling.steps}; {sampling.scheduler} takes {least} to {most} with this base.")


def check_scheduler(sampling: Sampling, config: Mapping[str, Any], family: Family) -> None:
    """Refuse a scheduler that is not for a base's family. Raises UserError: names those that are."""
    allowed = family.schedulers(config)
    if sampling.scheduler not in allowed:
        raise UserError(f"scheduler = {sampling.scheduler}; a base of {family.title} takes {', '.join(allowed)}.")


def make_scheduler(name: str, config: Any, family: Family = DEFAULT) -> Any:
    """A diffusers scheduler by its short name, with the base's noise schedule."""
    if isinstance(family.objective, FlowMatching):
        own = dict(config.get("flow_matching", config))
        return FlowDPMSolver.of(own) if name == "dpm++" else FlowMatchEulerDiscreteScheduler.from_config(own)
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(dict(config), **options)

"""What a denoiser is trained to do: noise, timesteps, targets, weights and the loss, as equations.

With latents x₀, noise ε ~ N(0, I), a timestep t and the scheduler's ᾱ_t (DDPM, arXiv 2006.11239):

    x_t = √ᾱ_t x₀ + √(1 - ᾱ_t) ε              the noisy latents
    y = ε  or  √ᾱ_t ε - √(1 - ᾱ_t) x₀         the target: noise, or velocity (arXiv 2202.00512)
    L = mean of w_t m (f(x_t, t) - y)²         the loss, with a weight w_t per sample and a mask m

Denoisers of flow matching (arXiv 2210.02747) take other noisy latents and have another target, with σ in [0, 1]:

    x_σ = (1 - σ) x₀ + σ ε,    y = ε - x₀,    t = 1000 σ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import Base
from ether_diffusion.models.families.family import Diffusion, FlowMatching
from ether_diffusion.randomness import generator

Stream = tuple[str, int]
"""The source of a sample's random numbers: a name and the global sample index. With the run's seed it makes them the
same in any batch and process."""


def make_objective(base: Base) -> Objective:
    """What the denoiser of a base is trained to do."""
    objective = base.family.objective
    if isinstance(objective, Diffusion):
        return DiffusionObjective(base.scheduler_config)
    return FlowObjective(base.scheduler_config, objective)


class Objective:
    """Timesteps, noisy latents, targets and weights of samples, in the shapes of the functions below."""

    def timesteps(self, seed: int, streams: Sequence[Stream]) -> Tensor:
        raise NotImplementedError

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self, t: Tensor, gamma: float | None) -> Tensor:
        """Weights (B,) in fp32. Raises UserError: the objective has none for `gamma`."""
        raise NotImplementedError


class DiffusionObjective(Objective):
    """Noise or velocity, by the base's noise schedule."""

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        self.scheduler: Any = DDPMScheduler.from_config(scheduler_config)

    def timesteps(self, seed: int, streams: Sequence[Stream]) -> Tensor:
        return random_timesteps(seed, streams, self.scheduler)

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return noisy_latents(x0, eps, t, self.scheduler)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return target(x0, eps, t, self.scheduler)

    def weights(self, t: Tensor, gamma: float | None) -> Tensor:
        return min_snr_weights(t, self.scheduler, gamma)


class FlowObjective(Objective):
    """The velocity of a straight path from latents to noise.

    Timesteps are those of the base's own scheduler, so that its static shift is in them; a shift by the size of images,
    which pipelines apply when they sample, is not, as in diffusers' training examples.
    """

    def __init__(self, scheduler_config: dict[str, Any], settings: FlowMatching) -> None:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        self.density, self.levels = settings.density, scheduler.timesteps.float()

    def timesteps(self, seed: int, streams: Sequence[Stream]) -> Tensor:
        """t (B,) in (0, 1000], in fp32."""
        shares = torch.stack([self._share(generator(seed, f"{s}/timestep", i)) for s, i in streams])
        return self.levels[(shares * len(self.levels)).long().clamp(max=len(self.levels) - 1)]

    def _share(self, random: torch.Generator) -> Tensor:
        """The place among the scheduler's timesteps, in [0, 1]."""
        if self.density == "logit_normal":
            return torch.randn((), generator=random).sigmoid()
        return torch.rand((), generator=random)

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        sigma = (t / 1000).reshape(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def weights(self, t: Tensor, gamma: float | None) -> Tensor:
        if gamma is not None:
            raise UserError(
                f"training.min_snr_gamma: {gamma:g}, but this base is trained by flow matching, which has no such "
                "weights; leave it out, or null."
            )
        return torch.ones(len(t), device=t.device)


def normal(seed: int, streams: Sequence[Stream], name: str, shape: Sequence[int]) -> Tensor:
    """Numbers ~ N(0, 1) for each sample: (B, *shape) in fp32, on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, f"{s}/{name}", i)) for s, i in streams])


def random_timesteps(seed: int, streams: Sequence[Stream], scheduler: DDPMScheduler) -> Tensor:
    """t for each sample, uniform over the scheduler's timesteps: (B,), on the CPU."""
    count = scheduler.config["num_train_timesteps"]
    return torch.cat([torch.randint(count, (1,), generator=generator(seed, f"{s}/timestep", i)) for s, i in streams])


def noisy_latents(x0: Tensor, eps: Tensor, t: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """x_t = √ᾱ_t x₀ + √(1 - ᾱ_t) ε, (B, C, h, w)."""
    return scheduler.add_noise(x0, eps, t)  # pyright: ignore[reportArgumentType]


def target(x0: Tensor, eps: Tensor, t: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """y (B, C, h, w): ε, or the velocity √ᾱ_t ε - √(1 - ᾱ_t) x₀, by the scheduler's `prediction_type`."""
    if scheduler.config["prediction_type"] == "epsilon":
        return eps
    return scheduler.get_velocity(x0, eps, t)  # pyright: ignore[reportArgumentType]


def min_snr_weights(t: Tensor, scheduler: DDPMScheduler, gamma: float | None) -> Tensor:
    """w_t = min(SNR, γ) / SNR for ε, / (SNR + 1) for the velocity, with SNR = ᾱ_t / (1 - ᾱ_t); arXiv 2303.09556.

    Args:
        t: Timesteps (B,).
        gamma: γ; None: all weights are 1.

    Returns:
        (B,) in fp32, on the device of `t`.
    """
    if gamma is None:
        return torch.ones(len(t), device=t.device)
    snr = compute_snr(scheduler, t)
    return snr.clamp(max=gamma) / (snr if scheduler.config["prediction_type"] == "epsilon" else snr + 1)


def denoising_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    instances: int | None = None,
    prior_weight: float = 0.0,
) -> dict[str, Tensor]:
    """L over all samples; or, with class samples, L over instances + λ L over class samples (arXiv 2208.12242).

    Args:
        prediction, target: f(x_t, t) and y, (B, C, h, w), compared in at least fp32.
        weights: w_t (B,).
        mask: m (B, 1, h, w) in [0, 1]. The mean is over all places: divided by the mask's area, a crop with a sliver
            of white would weigh as much as a whole subject.
        instances: How many samples are instances, the first ones; the rest are class samples. None: all.
        prior_weight: λ.

    Returns:
        `loss`, and with class samples `instance_loss` and `prior_loss`; scalars in at least fp32.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    squares = F.mse_loss(prediction.to(dtype), target.to(dtype), reduction="none")  # (B, C, h, w)
    if mask is not None:
        squares = squares * mask
    errors = squares.mean(dim=(1, 2, 3)) * weights  # (B,)
    if instances is None or instances == len(errors):
        return {"loss": errors.mean()}
    instance, prior = errors[:instances].mean(), errors[instances:].mean()
    return {"loss": instance + prior_weight * prior, "instance_loss": instance, "prior_loss": prior}

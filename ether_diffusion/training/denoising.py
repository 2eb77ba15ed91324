"""What tasks share that teach a UNet to denoise: pictures -> noisy latents and targets, prompts -> text features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ether_diffusion.models.bases import Base, move
from ether_diffusion.randomness import generator

from .config import TaskConfig
from .latent_cache import release

Stream = tuple[str, int]
"""Where a sample's random numbers come from: a name and the global sample index."""
CACHED_FEATURES_BYTES = 256 * 2**20
"""Bytes of text features that stay on the device; past them, prompts are encoded again when they come again."""


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, C, h, w), in fp32."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


class DenoisingTask:
    """Latents, noise, timesteps, targets and text features; the frozen encoders, which may wait elsewhere."""

    def __init__(
        self, config: TaskConfig, base: Base, device: torch.device, dtype: torch.dtype, *, trains_text: bool = False
    ) -> None:
        self.config, self.base = config, base
        self.device, self.dtype, self.trains_text = device, dtype, trains_text
        self.noise: Any = DDPMScheduler.from_config(base.scheduler_config)
        self.idle: list[nn.Module] = []
        """Encoders that training does without, on the CPU until something is drawn."""
        self.features: dict[str, Tensor] = {}
        """Text features of prompts that were met, (1, 77, D) each, the latest last."""
        move(base.vae, device)
        move(base.text_encoder, device)

    def noised(self, moments: Sequence[tuple[Tensor, Tensor]], streams: Sequence[Stream]) -> dict[str, Tensor]:
        """Latents sampled from their moments, noised at random timesteps; what is to be predicted; the losses' weights.

        Every draw is a function of (seed, stream, sample index).

        Returns:
            `noisy_latents` (B, C, h, w) in the precision of training, `timesteps` (B,), `target` (B, C, h, w) and
            `weights` (B,) in fp32.
        """
        seed = self.config.seed

        def per_sample(name: str, shape: Sequence[int]) -> Tensor:
            draws = [torch.randn(*shape, generator=generator(seed, f"{s}/{name}", i)) for s, i in streams]
            return torch.stack(draws).to(self.device)

        mean, deviation = (torch.stack(part).to(self.device) for part in zip(*moments, strict=True))
        shape = mean.shape[1:]
        latents = (mean + deviation * per_sample("latents", shape)) * self.base.vae.config["scaling_factor"]
        noise = per_sample("noise", shape)
        if self.config.training.noise_offset:
            noise = noise + self.config.training.noise_offset * per_sample("noise_offset", (shape[0], 1, 1))
        steps = self.noise.config["num_train_timesteps"]
        drawn = [torch.randint(steps, (1,), generator=generator(seed, f"{s}/timestep", i)) for s, i in streams]
        timesteps = torch.cat(drawn).to(self.device)
        epsilon = self.base.prediction_type == "epsilon"
        return {
            "noisy_latents": self.noise.add_noise(latents, noise, timesteps).to(self.dtype),
            "timesteps": timesteps,
            "target": noise if epsilon else self.noise.get_velocity(latents, noise, timesteps),
            "weights": self._weights(timesteps),
        }

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of one picture's latents, in fp32. Alone, so that no batch rounds them."""
        vae: Any = self.base.vae
        moments = vae.encode(pixels[None].to(self.device, vae.dtype)).latent_dist
        return moments.mean[0].float(), moments.std[0].float()

    def text(self, prompts: list[str]) -> dict[str, Any]:
        """Token ids for a text encoder that is trained; else its features (B, 77, D), each prompt encoded alone."""
        if self.trains_text:
            return {"encoder_hidden_states": None, "input_ids": self._tokens(prompts)}
        return {"encoder_hidden_states": torch.cat([self._cached_features(prompt) for prompt in prompts])}

    def encode_text(self, prompt: str) -> Tensor:
        """(1, 77, D), as the text encoder gives them."""
        return self.base.text_encoder(self._tokens([prompt]))[0]

    def offload_encoders(self, encoders: Sequence[nn.Module], *, needed_for_sampling: bool) -> None:
        """Have training do without these encoders: they wait on the CPU where images are drawn with them, or go."""
        self.idle = list(encoders)
        for encoder in encoders:
            if needed_for_sampling:
                move(encoder, torch.device("cpu"))
            else:
                release(encoder)

    @contextlib.contextmanager
    def sampling_mode(self, *models: nn.Module) -> Iterator[None]:
        """Have the models and the encoders ready to draw with; afterwards they are as they were."""
        was_training = [model.training for model in models]
        for model in models:
            model.eval()
        for encoder in self.idle:
            move(encoder, self.device)
        try:
            yield
        finally:
            for model, training in zip(models, was_training, strict=True):
                model.train(training)
            for encoder in self.idle:
                move(encoder, torch.device("cpu"))

    def _weights(self, timesteps: Tensor) -> Tensor:
        gamma = self.config.training.min_snr_gamma
        if gamma is None:
            return torch.ones(len(timesteps), device=self.device)
        snr = compute_snr(self.noise, timesteps)
        return snr.clamp(max=gamma) / (snr if self.base.prediction_type == "epsilon" else snr + 1)

    def _cached_features(self, prompt: str) -> Tensor:
        if prompt not in self.features:
            features = self.encode_text(prompt).to(self.dtype)
            if len(self.features) >= max(1, CACHED_FEATURES_BYTES // features.nbytes):
                del self.features[next(iter(self.features))]
            self.features[prompt] = features
        return self.features[prompt]

    def _tokens(self, prompts: list[str]) -> Tensor:
        length = self.base.tokenizer.model_max_length
        tokens = self.base.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens["input_ids"].to(self.device)  # pyright: ignore[reportAttributeAccessIssue]

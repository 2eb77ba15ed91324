"""The VAE and the text encoder in training: images -> moments of latents, prompts -> features, cached or offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ether_diffusion.models.bases import Base, move

from .environment import to_device
from .latent_cache import EncodedSamples, EncoderCache, read_encoded

CACHED_FEATURES_BYTES = 256 * 2**20
"""Text features to keep on the device, in bytes; prompts beyond them are encoded again."""


class FrozenEncoders:
    """A base's VAE and text encoder, on the device.

    Args:
        dtype: Of the text features.
        needed_for_sampling: Whether images are generated during training, so that no encoder can be freed.
    """

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype, needed_for_sampling: bool) -> None:
        self.vae, self.text_encoder, self.tokenizer = base.vae, base.text_encoder, base.tokenizer
        self.device, self.dtype, self.needed_for_sampling = device, dtype, needed_for_sampling
        self.shared = False
        """With other runs of this process, which need them on the device: they are not offloaded."""
        self.offloaded: list[nn.Module] = []
        """On the CPU, except when images are generated."""
        self.features: dict[str, Tensor] = {}
        """Text features by prompt, (1, 77, D) each, the latest last."""
        move(self.vae, device)
        move(self.text_encoder, device)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an image's latents, (C, h, w) each, in fp32.

        Args:
            pixels: (3, H, W) in [-1, 1]: one image, so that rounding does not depend on a batch.
        """
        vae: Any = self.vae
        distribution = vae.encode(to_device(pixels[None], self.device).to(vae.dtype)).latent_dist
        return distribution.mean[0].float(), distribution.std[0].float()

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids (B, 77)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return to_device(tokens["input_ids"], self.device)  # pyright: ignore[reportArgumentType]

    def text(self, prompts: list[str]) -> Tensor:
        """Text features (B, 77, D), each prompt encoded alone and, as far as there is room, once."""
        found = []
        for prompt in prompts:
            if prompt not in self.features:
                features = self.encode_text(prompt).to(self.dtype)
                if len(self.features) >= max(1, CACHED_FEATURES_BYTES // features.nbytes):
                    del self.features[next(iter(self.features))]
                self.features[prompt] = features
            found.append(self.features[prompt])
        return torch.cat(found)

    def encode_text(self, prompt: str) -> Tensor:
        """(1, 77, D), in the text encoder's dtype."""
        return self.text_encoder(self.tokens([prompt]))[0]

    @torch.no_grad()
    def cache_latents(self, samples: EncodedSamples, number: int, root: Path, accelerator: Accelerator) -> None:
        """Encode the images of the first `number` samples once, into `root`."""
        uses = samples.first_uses(number)

        def encode(key: Any) -> dict[str, Tensor]:
            mean, deviation = self.moments(samples.dataset.pixels(*uses[key]))
            return {"mean": mean, "deviation": deviation}

        cache = EncoderCache(root, "latents", self.vae, encode, dtype=str(self.vae.dtype))
        samples.files = cache.fill(uses, accelerator)

    @torch.no_grad()
    def cache_text(self, prompts: Sequence[str], root: Path, accelerator: Accelerator) -> None:
        """Encode prompts once, into `root`, and keep all their features on the device."""

        def encode(prompt: str) -> dict[str, Tensor]:
            return {"features": self.encode_text(prompt)}

        cache = EncoderCache(root, "text", self.text_encoder, encode, dtype=str(self.vae.dtype))
        for prompt, file in cache.fill(prompts, accelerator).items():
            self.features[prompt] = read_encoded(file)["features"].to(self.device, self.dtype)

    def offload(self, *encoders: nn.Module) -> None:
        """Move encoders to the CPU until images are generated; free them, weights and all, if none will be."""
        if self.shared:
            return
        for encoder in encoders:
            move(encoder, torch.device("cpu" if self.needed_for_sampling else "meta"))
        if self.needed_for_sampling:
            self.offloaded = list(encoders)
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()

    @contextlib.contextmanager
    def sampling_mode(self, *models: nn.Module) -> Iterator[None]:
        """Within the block the models are in evaluation mode, and offloaded encoders are on the device."""
        was_training = [model.training for model in models]
        for model in models:
            model.eval()
        for encoder in self.offloaded:
            move(encoder, self.device)
        try:
            yield
        finally:
            for model, training in zip(models, was_training, strict=True):
                model.train(training)
            for encoder in self.offloaded:
                move(encoder, torch.device("cpu"))

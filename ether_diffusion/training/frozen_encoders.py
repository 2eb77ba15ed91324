"""The VAE and the text encoders in training: images -> moments of latents, prompts -> features, cached or offloaded."""

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


_IN_FILES = {"encoder_hidden_states": "features"}
"""Names of conditioning in files of the cache, where they differ."""


class FrozenEncoders:
    """A base's VAE and text encoders, on the device.

    Args:
        dtype: Of the text features.
        needed_for_sampling: Whether images are generated during training, so that no encoder can be freed.
    """

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype, needed_for_sampling: bool) -> None:
        self.family, self.parts, self.vae, self.text_encoders = base.family, base.parts, base.vae, base.text_encoders
        self.device, self.dtype, self.needed_for_sampling = device, dtype, needed_for_sampling
        self.shared = False
        """With other runs of this process, which need them on the device: they are not offloaded."""
        self.offloaded: list[nn.Module] = []
        """On the CPU, except when images are generated."""
        self.features: dict[str, dict[str, Tensor]] = {}
        """Conditioning by prompt, for one sample each, the latest last."""
        for encoder in (self.vae, *self.text_encoders.values()):
            move(encoder, device)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an image's latents, (C, h, w) each, in fp32.

        Args:
            pixels: (3, H, W) in [-1, 1]: one image, so that rounding does not depend on a batch.
        """
        mean, deviation = self.family.moments(self.vae, to_device(pixels[None], self.device).to(self.vae.dtype))
        return mean[0].float(), deviation[0].float()

    def tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the text encoders read of prompts."""
        return {name: to_device(ids, self.device) for name, ids in self.family.tokens(self.parts, prompts).items()}

    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning by prompts, each encoded alone and, as far as there is room, once."""
        found = []
        for prompt in prompts:
            if prompt not in self.features:
                features = {name: self._cast(tensor) for name, tensor in self.encode_text(prompt).items()}
                size = sum(tensor.nbytes for tensor in features.values())
                if len(self.features) >= max(1, CACHED_FEATURES_BYTES // size):
                    del self.features[next(iter(self.features))]
                self.features[prompt] = features
            found.append(self.features[prompt])
        return {name: torch.cat([features[name] for features in found]) for name in found[0]}

    def encode_text(self, prompt: str) -> dict[str, Tensor]:
        """The conditioning of one prompt, in the text encoders' dtype."""
        return self.family.encode(self.parts, self.tokens([prompt]))

    def _cast(self, tensor: Tensor) -> Tensor:
        """In the precision of training, unless it is a mask."""
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @torch.no_grad()
    def cache_latents(self, samples: EncodedSamples, number: int, root: Path, accelerator: Accelerator) -> None:
        """Encode the images of the first `number` samples once, into `root`."""
        uses = samples.first_uses(number)

        def encode(key: Any) -> dict[str, Tensor]:
            mean, deviation = self.moments(samples.dataset.pixels(*uses[key]))
            return {"mean": mean, "deviation": deviation}

        cache = EncoderCache(root, "latents", [self.vae], encode, dtype=str(self.vae.dtype))
        samples.files = cache.fill(uses, accelerator)

    @torch.no_grad()
    def cache_text(self, prompts: Sequence[str], root: Path, accelerator: Accelerator) -> None:
        """Encode prompts once, into `root`, and keep all their features on the device."""

        def encode(prompt: str) -> dict[str, Tensor]:
            return {_IN_FILES.get(name, name): tensor for name, tensor in self.encode_text(prompt).items()}

        encoders = list(self.text_encoders.values())
        cache = EncoderCache(root, "text", encoders, encode, dtype=str(encoders[0].dtype))
        for prompt, file in cache.fill(prompts, accelerator).items():
            found = read_encoded(file)
            self.features[prompt] = {
                name: self._cast(found[_IN_FILES.get(name, name)].to(self.device)) for name in self.family.conditioning
            }

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

"""FLUX.1: a transformer over packed latents and T5's features, modulated by CLIP's vector, trained by flow matching.

`FLUX.1-dev` is distilled from a guided model and takes the guidance scale as an input; `FLUX.1-schnell` takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.errors import UserError

from .family import Family, FlowMatching, Parts, token_ids

T5_TOKENS = 512
TRAINED_AT = 1.0
"""The guidance scale in training, at which a distilled base is its own conditional model."""


class Flux1(Family):
    """2 x 2 latents make one token of the transformer's."""

    name = "flux"
    title = "FLUX.1"
    pipeline_class = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder",)
    conditioning = ("encoder_hidden_states", "pooled_projections")
    half = torch.bfloat16
    large_text_encoders = True
    objective = FlowMatching("uniform")
    sampling = MappingProxyType({"scheduler": "euler", "steps": 28, "guidance": 3.5})
    loading = MappingProxyType({"image_encoder": None, "feature_extractor": None})

    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {
            "input_ids": token_ids(parts["tokenizer"], prompts),
            "input_ids_2": token_ids(parts["tokenizer_2"], prompts, T5_TOKENS),
        }

    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": parts["text_encoder_2"](tokens["input_ids_2"])[0],
            "pooled_projections": parts["text_encoder"](tokens["input_ids"]).pooler_output,
        }

    def prompt_reader(self, parts: Parts) -> tuple[Any, int]:
        return parts["tokenizer_2"], T5_TOKENS

    def resolution(self, parts: Parts) -> int:
        return 128 * self.vae_factor(parts["vae"])

    def latent_multiple(self, denoiser: Any) -> int:
        return 2

    def denoise(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        features = {name: conditioning[name] for name in self.conditioning}
        height, width = noisy.shape[-2:]
        scale = noisy.new_full((len(noisy),), TRAINED_AT) if denoiser.config["guidance_embeds"] else None
        predicted = denoiser(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            guidance=scale,
            **features,
            txt_ids=noisy.new_zeros(features["encoder_hidden_states"].shape[1], 3),
            img_ids=places(height // 2, width // 2).to(noisy),
            return_dict=False,
        )[0]
        return unpacked(predicted, height, width)

    def call_arguments(self, guidance: float, negative_prompts: Sequence[str]) -> dict[str, Any]:
        if any(negative_prompts):
            raise UserError(f"negative_prompt: {max(negative_prompts)!r:.60}, but {self.title} takes none.")
        return {"guidance_scale": guidance}


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): the channels of each square of 2 x 2, channel by channel."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: (B, h/2 w/2, 4 C) -> (B, C, h, w)."""
    squares = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def places(rows: int, columns: int) -> Tensor:
    """The positions of tokens: (rows x columns, 3), with row and column in the last two."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()

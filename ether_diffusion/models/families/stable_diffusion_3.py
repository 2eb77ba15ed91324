"""Stable Diffusion 3 and 3.5: a transformer over latents and text, trained by flow matching (arXiv 2403.03206).

Prompts go through two CLIP text encoders and T5, without which the family works too: zeros take its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Family, FlowMatching, Parts, token_ids

T5_TOKENS = 256


class StableDiffusion3(Family):
    """Timesteps in training are logit-normal, then shifted as the base's scheduler states."""

    name = "sd3"
    title = "Stable Diffusion 3"
    pipeline_class = "StableDiffusion3Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    conditioning = ("encoder_hidden_states", "pooled_projections")
    half = torch.bfloat16
    large_text_encoders = True
    objective = FlowMatching("logit_normal")
    sampling = MappingProxyType({"scheduler": "euler", "steps": 28, "guidance": 7.0})
    loading = MappingProxyType({"image_encoder": None, "feature_extractor": None})

    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = {
            "input_ids": token_ids(parts["tokenizer"], prompts),
            "input_ids_2": token_ids(parts["tokenizer_2"], prompts),
        }
        if parts["text_encoder_3"] is not None:
            found["input_ids_3"] = token_ids(parts["tokenizer_3"], prompts, T5_TOKENS)
        return found

    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clips = [
            parts[encoder](tokens[ids], output_hidden_states=True)
            for encoder, ids in (("text_encoder", "input_ids"), ("text_encoder_2", "input_ids_2"))
        ]
        clip = torch.cat([found.hidden_states[-2] for found in clips], dim=-1)
        width = parts["transformer"].config["joint_attention_dim"]
        if "input_ids_3" in tokens:
            t5 = parts["text_encoder_3"](tokens["input_ids_3"])[0]
        else:
            t5 = clip.new_zeros(len(clip), T5_TOKENS, width)
        features = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5.to(clip.dtype)], dim=1)
        return {
            "encoder_hidden_states": features,
            "pooled_projections": torch.cat([found[0] for found in clips], dim=-1),
        }

    def prompt_reader(self, parts: Parts) -> tuple[Any, int]:
        t5 = parts["tokenizer_3"] if parts["text_encoder_3"] is not None else None
        return super().prompt_reader(parts) if t5 is None else (t5, T5_TOKENS)

    def resolution(self, parts: Parts) -> int:
        return int(parts["transformer"].config["sample_size"]) * self.vae_factor(parts["vae"])

    def latent_multiple(self, denoiser: Any) -> int:
        return denoiser.config["patch_size"]

    def denoise(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        features = {name: conditioning[name] for name in self.conditioning}
        return denoiser(hidden_states=noisy, timestep=timesteps, **features, return_dict=False)[0]

    def call_arguments(self, guidance: float, negative_prompts: Sequence[str]) -> dict[str, Any]:
        return {"guidance_scale": guidance, "negative_prompt": list(negative_prompts)}

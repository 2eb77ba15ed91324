"""Z-Image: a transformer over latents and Qwen3's features in one sequence (arXiv 2511.22699), by flow matching.

Prompts of a batch have different lengths, without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .family import Family, FlowMatching, Parts

TOKENS = 512


class ZImage(Family):
    """Its guidance scale counts from 0: the difference that guidance makes is added `guidance` times."""

    name = "z-image"
    title = "Z-Image"
    pipeline_class = "ZImagePipeline"
    conditioning = ("encoder_hidden_states", "encoder_attention_mask")
    half = torch.bfloat16
    large_text_encoders = True
    objective = FlowMatching("uniform")
    sampling = MappingProxyType({"scheduler": "euler", "steps": 50, "guidance": 5.0})

    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts["tokenizer"]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options) for prompt in prompts]
        found = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"].bool()}

    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = tokens["attention_mask"]
        found = parts["text_encoder"](input_ids=tokens["input_ids"], attention_mask=mask, output_hidden_states=True)
        return {"encoder_hidden_states": found.hidden_states[-2], "encoder_attention_mask": mask}

    def prompt_reader(self, parts: Parts) -> tuple[Any, int]:
        return parts["tokenizer"], TOKENS

    def resolution(self, parts: Parts) -> int:
        return 128 * self.vae_factor(parts["vae"])

    def latent_multiple(self, denoiser: Any) -> int:
        return max(denoiser.config["all_patch_size"])

    def denoise(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        prompts = zip(conditioning["encoder_hidden_states"], conditioning["encoder_attention_mask"], strict=True)
        found = denoiser(
            list(noisy.unsqueeze(2).unbind(0)),  # each (C, 1, h, w): a film of one picture
            (1000 - timesteps) / 1000,
            [features[mask] for features, mask in prompts],
            return_dict=False,
        )[0]
        return -torch.stack(list(found)).squeeze(2)  # it predicts x₀ - ε

    def call_arguments(self, guidance: float, negative_prompts: Sequence[str]) -> dict[str, Any]:
        return {"guidance_scale": guidance, "negative_prompt": list(negative_prompts)}

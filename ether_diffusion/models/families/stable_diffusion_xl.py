"""Stable Diffusion XL: a UNet under the features of two CLIP text encoders, and under the sizes and crops of images.

SDXL, arXiv 2307.01952: sections 2.2 (sizes and crops as conditions) and 2.5 (text encoders).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .family import Parts, all_but_last_layer, token_ids
from .stable_diffusion_v1 import StableDiffusion1


class StableDiffusionXL(StableDiffusion1):
    """`encoder_hidden_states` are the last but one layers of both encoders; `text_embeds` is the second's vector."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    original_layout = False
    pipeline_class = "StableDiffusionXLPipeline"
    other_pipelines = ("StableDiffusionXLControlNetPipeline",)
    text_encoders = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = text_encoders
    conditioning = ("encoder_hidden_states", "text_embeds")
    conditioning_of_frames = ("time_ids",)
    kohya_prefixes = MappingProxyType(
        {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    )
    options = ("force_zeros_for_empty_prompt",)
    sampling = MappingProxyType({"steps": 50, "guidance": 5.0})
    loading = MappingProxyType({"image_encoder": None, "feature_extractor": None, "add_watermarker": False})

    def is_of(self, pipeline_class: str, denoiser_config: Mapping[str, Any]) -> bool:
        return pipeline_class in (self.pipeline_class, *self.other_pipelines)

    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        names = zip(("input_ids", "input_ids_2"), self.tokenizers, strict=True)
        return {name: token_ids(parts[tokenizer], prompts) for name, tokenizer in names}

    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = parts["text_encoder"](tokens["input_ids"], output_hidden_states=True)
        second = parts["text_encoder_2"](tokens["input_ids_2"], output_hidden_states=True)
        features = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": features, "text_embeds": second[0]}

    def text_target(self, text_encoder: str, model: Any) -> str | None:
        return all_but_last_layer(model) if text_encoder == "text_encoder" else None

    def of_frames(self, frames: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {"time_ids": torch.tensor([list(frame) for frame in frames], dtype=torch.float32)}

    def unet_arguments(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": conditioning["encoder_hidden_states"], "added_cond_kwargs": added}

    def call_arguments(self, guidance: float, negative_prompts: Sequence[str]) -> dict[str, Any]:
        found = super().call_arguments(guidance, negative_prompts)
        # Without negative prompts its pipeline has zeros in the place of their features, as the base was trained.
        return found if any(negative_prompts) else {**found, "negative_prompt": None}

    def sort_of(self, negative_prompt: str) -> Any:
        return bool(negative_prompt)

    def kohya_facts(self, prediction_type: str) -> dict[str, str]:
        return self._kohya_facts("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")

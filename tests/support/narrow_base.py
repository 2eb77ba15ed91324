"""Stable Diffusion v1's layout with few and narrow layers, and random weights: a whole base in some megabytes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ether_diffusion.models.families.stable_diffusion_v1 import CONFIGS, SCHEDULER, UNCHECKED
from ether_diffusion.tinyworld import WEIGHTS

_UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "sample_size": 8,
}
_VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
_TOKENIZER = CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" / "tokenizer")  # CLIP's own takes a second to read
_TEXT = {
    "vocab_size": 672,
    "bos_token_id": 670,
    "eos_token_id": 671,
    "max_position_embeddings": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NARROW: dict[str, dict[str, Any]] = {
    "unet": {**CONFIGS["unet"], **_UNET},
    "vae": {**CONFIGS["vae"], **_VAE},
    "text_encoder": {**CONFIGS["text_encoder"], **_TEXT},
}


def narrow_base() -> StableDiffusionPipeline:
    """The same weights at each call."""
    torch.manual_seed(3)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**NARROW["unet"]).eval(),
        "vae": AutoencoderKL(**NARROW["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**NARROW["text_encoder"])).eval(),
        "tokenizer": _TOKENIZER,
        "scheduler": PNDMScheduler(**SCHEDULER),
    }
    return StableDiffusionPipeline(**parts, **UNCHECKED)

"""Stable Diffusion v1: the family; and the architecture of v1.5: public configs, tokenizer, a UNet with random weights.

Nothing is fetched. The UNet serves to measure parameters, time and memory.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .family import Diffusion, Family, Parts, token_ids

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}

UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
"""Arguments of a StableDiffusionPipeline without a safety checker."""


class StableDiffusion1(Family):
    """A UNet under the features of CLIP's text encoder, 77 tokens; noise or velocity."""

    name = "sd1"
    title = "Stable Diffusion v1"
    pipeline_class = "StableDiffusionPipeline"
    other_pipelines = ("StableDiffusionControlNetPipeline",)
    denoiser = "unet"
    trainable_text_encoders = ("text_encoder",)
    objective = Diffusion()
    takes_hints = True
    original_layout = True
    kohya_prefixes = MappingProxyType({"unet": "lora_unet_", "text_encoder": "lora_te_"})
    loading = MappingProxyType({**UNCHECKED, "image_encoder": None})

    def is_of(self, pipeline_class: str, denoiser_config: Mapping[str, Any]) -> bool:
        return super().is_of(pipeline_class, denoiser_config) and not denoiser_config.get("use_linear_projection")

    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": token_ids(parts["tokenizer"], prompts)}

    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": parts["text_encoder"](tokens["input_ids"])[0]}

    def resolution(self, parts: Parts) -> int:
        return int(parts["unet"].config["sample_size"]) * self.vae_factor(parts["vae"])

    def latent_multiple(self, denoiser: Any) -> int:
        return 2 ** (len(denoiser.config["block_out_channels"]) - 1)

    def denoise(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        return denoiser(noisy, timesteps, **self.unet_arguments(conditioning)).sample

    def unet_arguments(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": conditioning["encoder_hidden_states"]}

    def kohya_facts(self, prediction_type: str) -> dict[str, str]:
        return self._kohya_facts("sd_v1", "stable-diffusion-v1")

    def _kohya_facts(self, version: str, architecture: str, v2: bool = False) -> dict[str, str]:
        return {
            "ss_base_model_version": version,
            "ss_v2": str(v2),
            "modelspec.architecture": f"{architecture}/lora",
        }


def build_unet() -> UNet2DConditionModel:
    """The UNet with random weights, 859,520,964 parameters; under `torch.device("meta")` a meta copy."""
    return UNet2DConditionModel(**UNET)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer, from the byte-pair merges in the package open_clip."""
    packed = (files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    pieces = ["".join(merge.split()) for merge in merges]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    pairs: Any = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)

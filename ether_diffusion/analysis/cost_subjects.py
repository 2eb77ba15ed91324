"""The models of Table 1 by their public configs: Phi-1.5 and Llama-2-7B; and Stable Diffusion v1.5's UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from ether_diffusion.adapters.targets import PRESETS
from ether_diffusion.models.stable_diffusion_v1 import UNET, build_unet

from .cost import Subject

PHI_1_5: dict[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
_PLAIN: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False}
TOKENS = 512
"""Length of the language models' input, batch 1. The paper does not state its own."""


def subjects(tokens: int = TOKENS, latents: int = 64) -> dict[str, Subject]:
    """The models by short names; `latents` is the side of the UNet's input, 64 for images of 512 x 512."""

    def words(config: dict[str, Any]) -> dict[str, Any]:
        # Without a given mask the model would read values, which meta tensors do not have.
        mask = torch.zeros(1, 1, tokens, tokens)
        return {"inputs_embeds": torch.zeros(1, tokens, config["hidden_size"]), "attention_mask": mask}

    def noise() -> dict[str, Any]:
        width = UNET["cross_attention_dim"]
        return {
            "sample": torch.zeros(1, 4, latents, latents),
            "timestep": torch.zeros(1, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(1, 77, width),
            "return_dict": False,
        }

    def phi() -> nn.Module:
        return PhiForCausalLM(PhiConfig(**PHI_1_5, **_PLAIN))

    def llama() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B, **_PLAIN))

    fused = ("q_proj", "k_proj", "v_proj")
    return {
        "phi": Subject("Phi-1.5", phi, lambda: words(PHI_1_5), (*fused, "dense"), fused, f"{tokens} tokens"),
        "llama": Subject("Llama-2-7B", llama, lambda: words(LLAMA_2_7B), (*fused, "o_proj"), fused, f"{tokens} tokens"),
        "unet": Subject(
            "Stable Diffusion v1.5, UNet", build_unet, noise, PRESETS["attention"], (), f"{latents} x {latents} latents"
        ),
    }

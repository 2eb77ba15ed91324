"""Trainable parameters on each family's real size, by preset and method: models without weights, on the meta device.

python benchmarks/family_sizes.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

from ether_diffusion.adapters.attach import attach, count_parameters, meta_copy
from ether_diffusion.adapters.method_settings import MethodSettings
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.presets import NAMES, presets_of
from ether_diffusion.adapters.targets import PRESETS, reach
from ether_diffusion.models.families.stable_diffusion_v1 import UNET

METHODS_SHOWN: dict[str, dict[str, Any]] = {"ether": {}, "ether_plus": {}, "lora": {"rank": 4}}

# The public configs, as their repositories on the hub have them.
SD2 = {
    **UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
MODELS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion v1.5": lambda: UNet2DConditionModel(**UNET),
    "Stable Diffusion v2.1": lambda: UNet2DConditionModel(**SD2),
    "Stable Diffusion XL": lambda: UNet2DConditionModel(**SDXL),
    "Stable Diffusion 3.5 medium": lambda: SD3Transformer2DModel(**SD3),
    "FLUX.1-dev": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "Z-Image": lambda: ZImageTransformer2DModel(),
}


def main() -> None:
    print(
        "| base | weights | preset | layers | reaches | ETHER | ETHER+ | LoRA r=4 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        weights = sum(parameter.numel() for parameter in model.parameters())
        for preset in NAMES if presets_of(model) else PRESETS:
            found = {method: _attached(model, METHODS[method](target=preset, **own)) for method, own in _shown()}
            layers, counts = found["lora"][0], " | ".join(f"{count:,}" for _, count in found.values())
            print(f"| {name} | {weights:,} | {preset} | {len(layers)} | {reach(model, layers)} | {counts} |")


def _shown() -> list[tuple[str, dict[str, Any]]]:
    return list(METHODS_SHOWN.items())


def _attached(model: Any, settings: MethodSettings) -> tuple[list[str], int]:
    copy = meta_copy(model)
    with torch.device("meta"):
        return attach(copy, settings), count_parameters(copy)


if __name__ == "__main__":
    main()

"""The networks by stage, as the configs of the shipped weights state: with random weights, or the shipped ones."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, SegformerForSemanticSegmentation, ViTModel

from ether_diffusion.tinyworld import WEIGHTS

NETWORKS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "autoencoder": (AutoencoderKL, "pipeline/vae", {}),
    "clip": (CLIPModel, "clip", {}),
    "denoiser": (UNet2DConditionModel, "pipeline/unet", {}),
    "backbone": (ViTModel, "backbone", {"add_pooling_layer": False}),
    "segmenter": (SegformerForSemanticSegmentation, "segmenter", {}),
}
"""Class, folder of the shipped weights, and arguments that the config does not hold."""


def random_network(stage: str) -> Any:
    """The stage's network with weights from torch's global generator, fp32."""
    kind, folder, arguments = NETWORKS[stage]
    if issubclass(kind, ConfigMixin):
        config: Any = kind.load_config(WEIGHTS / folder)
        return kind.from_config(config)
    return kind(kind.config_class.from_pretrained(WEIGHTS / folder), **arguments)


def shipped_weights() -> dict[str, dict[str, Tensor]]:
    """The shipped states by stage, in fp32."""
    return {
        stage: kind.from_pretrained(WEIGHTS / folder, torch_dtype=torch.float32, **arguments).state_dict()
        for stage, (kind, folder, arguments) in NETWORKS.items()
        if (WEIGHTS / folder).is_dir()
    }


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with v-prediction."""
    scheduler: Any = DDIMScheduler.from_pretrained(WEIGHTS / "pipeline/scheduler")
    return scheduler

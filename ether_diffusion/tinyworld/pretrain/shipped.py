"""The shipped weights, as a starting point for further training."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.tinyworld.scoring import load_scorers


def shipped_weights() -> dict[str, dict[str, Tensor]]:
    """The networks' states by stage, in fp32."""
    scorers, pipeline = load_scorers(), WEIGHTS / "pipeline"
    networks = {
        "autoencoder": AutoencoderKL.from_pretrained(pipeline, subfolder="vae", torch_dtype=torch.float32),
        "clip": scorers.clip,
        "backbone": scorers.backbone,
        "segmenter": scorers.segmenter,
    }
    if (pipeline / "unet").is_dir():
        networks["denoiser"] = UNet2DConditionModel.from_pretrained(
            pipeline, subfolder="unet", torch_dtype=torch.float32
        )
    return {stage: network.state_dict() for stage, network in networks.items()}  # pyright: ignore

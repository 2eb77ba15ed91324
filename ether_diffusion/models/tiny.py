"""`tiny`: the miniature, a Stable Diffusion of a small drawn world, small enough for two CPU cores.

The same classes, block types and interfaces as Stable Diffusion v1.5: 64 x 64 pictures, 16 x 16 latents, 10M
parameters. Its weights lie in the package; `ether_diffusion/tinyworld/weights/README.md` says how well it draws.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from ether_diffusion.tinyworld import WEIGHTS


def load_tiny() -> StableDiffusionPipeline:
    """The miniature pipeline, frozen, in fp32 on the CPU."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        WEIGHTS / "pipeline", dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval().requires_grad_(False)
    return pipeline

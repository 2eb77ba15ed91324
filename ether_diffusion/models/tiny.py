"""`tiny`: the miniature, a Stable Diffusion of a small drawn world, small enough for two CPU cores.

The same classes, block types and interfaces as Stable Diffusion v1.5: 64 x 64 pictures, 16 x 16 latents, 10M
parameters. Autoencoder and text encoder come trained, from the weights in the package. The UNet is not trained yet: it
is drawn from a seed, and what it makes is noise, before fine-tuning and after.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.tinyworld.networks import build_scheduler, build_unet

SEED = 20240529


def load_tiny() -> StableDiffusionPipeline:
    """The miniature pipeline, frozen, in fp32 on the CPU. The same weights every time; global generators untouched."""
    folder = WEIGHTS / "pipeline"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        unet=_untrained_unet(),
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval().requires_grad_(False)
    return pipeline


def _untrained_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build_unet()

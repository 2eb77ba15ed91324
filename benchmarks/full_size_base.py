"""Write the Stable Diffusion v1.5 architecture with random weights as a diffusers folder (4.3 GB), for measurements.

python benchmarks/full_size_base.py /path/outside/the/repository/sd15-random
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.models.families import stable_diffusion_v1 as sd


def random_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The whole pipeline with random weights, in fp32: 4.3 GB."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        unet=sd.build_unet(),
        vae=AutoencoderKL(**sd.VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sd.TEXT_ENCODER)),
        tokenizer=sd.clip_tokenizer(),
        scheduler=PNDMScheduler(**sd.SCHEDULER),  # pyright: ignore[reportArgumentType]
        **sd.UNCHECKED,
    )


def main() -> None:
    """Write the folder, unless it is there."""
    parser = argparse.ArgumentParser(description="Write a random Stable Diffusion v1.5 in diffusers' layout.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "model_index.json").exists():
        print(f"{folder} exists already.")
        return
    random_pipeline().save_pretrained(folder)
    print(f"Random weights in Stable Diffusion v1.5's architecture: {folder}")


if __name__ == "__main__":
    main()

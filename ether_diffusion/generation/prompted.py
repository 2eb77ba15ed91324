"""Prompts -> images, in batches that change nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from ether_diffusion.randomness import generator

from .sampling import Sampling, make_scheduler


@dataclass(frozen=True)
class Job:
    """One image: the k-th of a prompt."""

    prompt: str
    k: int
    file: str


def jobs_for(prompts: Sequence[str], images_per_prompt: int) -> list[Job]:
    """Every image of every prompt, each with its file name."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Job(prompt, k, f"{row:0{digits}d}-{slug(prompt)}-{k:02d}.png")
        for row, prompt in enumerate(prompts)
        for k in range(images_per_prompt)
    ]


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusionPipeline,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    seed: int,
    resolution: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[Job, Image.Image]]:
    """Draw the jobs in order. An image depends on (seed, prompt, k), not on its batch or its place in the list.

    Numbers that are NaN become black, and `fault` tells of them.
    """
    pipeline.scheduler = make_scheduler(sampling.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        with matching_dtypes(pipeline):
            output: Any = pipeline(
                prompt=[job.prompt for job in batch],
                negative_prompt=[sampling.negative_prompt] * len(batch),
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                height=resolution,
                width=resolution,
                eta=0.0,
                generator=[generator(seed, f"image/{job.prompt}", job.k) for job in batch],
                output_type="pt",
            )
        yield from zip(batch, to_images(pipeline, output.images), strict=True)
        if progress:
            progress(len(batch))


def fault(image: Image.Image) -> Literal["nan", "black"] | None:
    """What is wrong with an image that was just drawn: NaN somewhere in it, or black all over."""
    if image.info.get("nan"):
        return "nan"
    return None if image.getbbox() else "black"


def to_images(pipeline: DiffusionPipeline, drawn: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) from 0 to 1, as diffusers itself makes pictures of it, with a mark on those that hold NaN."""
    broken = drawn.isnan().flatten(1).any(1).tolist()
    processor: Any = pipeline.image_processor
    images = processor.numpy_to_pil(processor.pt_to_numpy(drawn.nan_to_num(0.0)))
    for image, is_broken in zip(images, broken, strict=True):
        image.info["nan"] = is_broken
    return images


def matching_dtypes(pipeline: DiffusionPipeline) -> torch.autocast:
    """While training, a half-precision UNet stands between a text encoder and a VAE in full precision."""
    dtype = pipeline.unet.dtype
    mixed = dtype in (torch.float16, torch.bfloat16) and pipeline.vae.dtype != dtype
    # Not `pipeline.device`, which is "meta" where layers are offloaded.
    return torch.autocast(pipeline._execution_device.type, dtype if mixed else torch.bfloat16, enabled=mixed)


def slug(prompt: str) -> str:
    """A short, readable and unambiguous file name part."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.blake2b(prompt.encode(), digest_size=3).hexdigest()}".lstrip("-")

"""Prompts, or captions and hints -> images, in batches that change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal, TypeVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from ether_diffusion.files import short_digest
from ether_diffusion.models.controlnet import ConditionedPipeline
from ether_diffusion.randomness import generator

from .sampling import ControllableSampling, Sampling, make_scheduler

Progress = Callable[[int], Any]
"""Called with the number of images that a batch has added."""
Fault = Literal["nan", "black"]


@dataclass(frozen=True)
class Job:
    """One image to sample: the k-th of a prompt."""

    prompt: str
    k: int
    file: str

    @property
    def stream(self) -> str:
        """The name of its noise, which seed and k complete."""
        return f"image/{self.prompt}"


@dataclass(frozen=True, eq=False)
class ConditionedJob:
    """One image to sample: the k-th under this condition."""

    name: str
    """The condition's. With k and the seed it gives the image's noise, whatever the prompt."""
    prompt: str
    hint: Tensor
    """(3, H, W) in [0, 1]; H and W are the image's, too."""
    k: int = 0

    @property
    def stream(self) -> str:
        """The name of its noise, which seed and k complete."""
        return f"image/{self.name}"


J = TypeVar("J", Job, ConditionedJob)


def jobs_for(prompts: Sequence[str], images_per_prompt: int) -> list[Job]:
    """Every image of every prompt, each with its file name."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Job(prompt, k, f"{row:0{digits}d}-{slug(prompt)}-{k:02d}.png")
        for row, prompt in enumerate(prompts)
        for k in range(images_per_prompt)
    ]


def sample_images(
    pipeline: StableDiffusionPipeline,
    jobs: Iterable[Job],
    sampling: Sampling,
    *,
    seed: int,
    resolution: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Iterator[tuple[Job, Image.Image]]:
    """Sample the jobs in order. An image depends on (seed, prompt, k), not on its batch or its place in the list.

    Numbers that are NaN become black, and `fault` reports them.

    Args:
        resolution: Side in pixels; default: the base's.
    """
    arguments = {"height": resolution, "width": resolution}
    batches = ((batch, arguments) for batch in _batches(jobs, batch_size))
    return _sample(pipeline, batches, sampling, seed, progress)


def sample_conditioned(
    pipeline: ConditionedPipeline,
    jobs: Iterable[ConditionedJob],
    sampling: ControllableSampling,
    *,
    seed: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Iterator[tuple[ConditionedJob, Image.Image]]:
    """Sample the jobs in order. An image depends on (seed, name, k, prompt, hint), not on its batch or its place.

    Numbers that are NaN become black, and `fault` reports them.

    Args:
        jobs: Taken one batch at a time, so that hints can be made as they are needed. Neighbours of one size share a
            batch.
    """
    condition = {
        "condition_scale": sampling.condition_scale,
        "control_guidance_start": sampling.condition_start,
        "control_guidance_end": sampling.condition_end,
    }
    batches = (
        (batch, {"image": torch.stack([job.hint for job in batch]), "height": height, "width": width, **condition})
        for (height, width), alike in groupby(jobs, key=lambda job: tuple(job.hint.shape[1:]))
        for batch in _batches(alike, batch_size)
    )
    return _sample(pipeline, batches, sampling, seed, progress)


def _batches(jobs: Iterable[J], batch_size: int) -> Iterator[list[J]]:
    jobs = iter(jobs)
    while batch := list(islice(jobs, batch_size)):
        yield batch


def _sample(
    pipeline: Any,
    batches: Iterable[tuple[list[J], dict[str, Any]]],
    sampling: Sampling,
    seed: int,
    progress: Progress | None,
) -> Iterator[tuple[J, Image.Image]]:
    """Sample batches, each with what the pipeline is to be called with beyond the settings that all images share."""
    pipeline.scheduler = make_scheduler(sampling.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for batch, arguments in batches:
        with torch.no_grad(), matching_dtypes(pipeline):
            output: Any = pipeline(
                prompt=[job.prompt for job in batch],
                negative_prompt=[sampling.negative_prompt] * len(batch),
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                eta=0.0,
                generator=[generator(seed, job.stream, job.k) for job in batch],
                output_type="pt",
                **arguments,
            )
        yield from zip(batch, to_images(pipeline, output.images), strict=True)
        if progress:
            progress(len(batch))


def fault(image: Image.Image) -> Fault | None:
    """What is wrong with an image that was just sampled: NaN somewhere in it, or black all over."""
    if image.info.get("nan"):
        return "nan"
    return None if image.getbbox() else "black"


def to_images(pipeline: DiffusionPipeline, sampled: Tensor) -> list[Image.Image]:
    """Pictures of (B, 3, H, W) in [0, 1], as diffusers itself makes them, with a mark on those that hold NaN."""
    broken = sampled.isnan().flatten(1).any(1).tolist()
    processor: Any = pipeline.image_processor
    images = processor.numpy_to_pil(processor.pt_to_numpy(sampled.nan_to_num(0.0)))
    for image, is_broken in zip(images, broken, strict=True):
        image.info["nan"] = is_broken
    return images


def matching_dtypes(pipeline: DiffusionPipeline) -> torch.autocast:
    """During training, a half-precision UNet stands between a text encoder and a VAE in full precision."""
    dtype = pipeline.unet.dtype
    mixed = dtype in (torch.float16, torch.bfloat16) and pipeline.vae.dtype != dtype
    # Not `pipeline.device`, which is "meta" where layers are offloaded.
    return torch.autocast(pipeline._execution_device.type, dtype if mixed else torch.bfloat16, enabled=mixed)


def slug(prompt: str) -> str:
    """A short, readable and unambiguous part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{short_digest(prompt, size=3)}".lstrip("-")

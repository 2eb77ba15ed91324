"""Captions and hints -> images, in batches that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.models.controlnet import ConditionedPipeline
from ether_diffusion.randomness import generator

from .prompted import matching_dtypes, to_images
from .sampling import ControllableSampling, make_scheduler


@dataclass(frozen=True, eq=False)
class ConditionedJob:
    """One image to draw: the k-th under this condition."""

    name: str
    """Of the condition. With k and the seed of the whole it gives the image's noise, whatever the prompt."""
    prompt: str
    hint: Tensor
    """(3, H, W) in [0, 1]; H and W are the image's, too."""
    k: int = 0


@torch.no_grad()
def sample_conditioned(
    pipeline: ConditionedPipeline,
    jobs: Iterable[ConditionedJob],
    sampling: ControllableSampling,
    *,
    seed: int,
    batch_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[ConditionedJob, Image.Image]]:
    """Draw the jobs in order. An image depends on (seed, name, k, prompt, hint), not on its batch or its place.

    Numbers that are NaN become black, and `fault` tells of them.

    Args:
        jobs: Taken one batch at a time, so that hints can be made as they are needed. Neighbours of one size share a
            batch.
    """
    pipeline.scheduler = make_scheduler(sampling.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for (height, width), alike in groupby(jobs, key=lambda job: tuple(job.hint.shape[1:])):
        while batch := list(islice(alike, batch_size)):
            with matching_dtypes(pipeline):
                output: Any = pipeline(
                    prompt=[job.prompt for job in batch],
                    negative_prompt=[sampling.negative_prompt] * len(batch),
                    image=torch.stack([job.hint for job in batch]),
                    height=height,
                    width=width,
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance,
                    eta=0.0,
                    condition_scale=sampling.condition_scale,
                    control_guidance_start=sampling.condition_start,
                    control_guidance_end=sampling.condition_end,
                    generator=[generator(seed, f"image/{job.name}", job.k) for job in batch],
                    output_type="pt",
                )
            yield from zip(batch, to_images(pipeline, output.images), strict=True)
            if progress:
                progress(len(batch))

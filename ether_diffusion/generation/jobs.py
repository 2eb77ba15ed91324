"""Prompts, with or without hints -> images, in batches that change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Literal, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ether_diffusion.adapters.adapter_bank import AdapterBank
from ether_diffusion.errors import UserError, first_line
from ether_diffusion.files import short_digest
from ether_diffusion.models.families.table import denoiser_of, family_of
from ether_diffusion.randomness import generator

from .sampling import ControllableSampling, Sampling, check_steps, make_scheduler

T = TypeVar("T")
Progress = Callable[[int], Any]
"""Called with the number of images that a batch has added."""
Fault = Literal["nan", "black"]


@dataclass(frozen=True)
class Job:
    """One image to sample: the k-th of a prompt, or under a condition."""

    prompt: str
    k: int = 0
    file: str = ""
    condition: str | None = None
    """The condition's name. With k and the seed it gives the image's noise, whatever the prompt."""
    hint: Tensor | None = field(default=None, compare=False)
    """(3, H, W) in [0, 1]; H and W are the image's, too."""
    adapter: str | None = None
    """Of a bank."""
    scale: float = 1.0
    """Its strength."""
    seed: int | None = None
    """None: that of the whole call."""
    negative_prompt: str | None = None
    """None: that of the sampling settings."""

    @property
    def stream(self) -> str:
        """The name of its noise, which seed and k complete."""
        return f"image/{self.prompt if self.condition is None else self.condition}"


def jobs_for(prompts: Sequence[str], images_per_prompt: int) -> list[Job]:
    """Every image of every prompt, each with its file name."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Job(prompt, k, f"{row:0{digits}d}-{slug(prompt)}-{k:02d}.png")
        for row, prompt in enumerate(prompts)
        for k in range(images_per_prompt)
    ]


def sample_images(
    pipeline: DiffusionPipeline,
    jobs: Iterable[Job],
    sampling: Sampling,
    *,
    seed: int,
    resolution: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
    bank: AdapterBank | None = None,
) -> Iterator[tuple[Job, Image.Image]]:
    """Sample the jobs in order. An image depends on the seed and its job, not on its batch or its place in the list.

    Numbers that are NaN become black, and `fault` reports them.

    Args:
        jobs: Taken one batch at a time, so that hints can be made as they are needed. Neighbours with hints of one size
            share a batch.
        sampling: `ControllableSampling` for jobs with hints.
        resolution: Side in pixels, or width and height, of images without a hint; default: the base's.
        batch_size: At most so many at a time. What does not fit into memory is halved, until it does.
        bank: On the pipeline's denoiser: each job takes its adapter.

    Raises:
        UserError: memory does not hold one image; or as `check_steps`.
    """
    model: Any = pipeline
    family = family_of(model)
    check_steps(sampling, model.scheduler.config, family)
    model.scheduler = make_scheduler(sampling.scheduler, model.scheduler.config, family)
    model.set_progress_bar_config(disable=True)
    fitting = batch_size
    for batch in _batches(jobs, batch_size, lambda job: family.sort_of(_negative(job, sampling))):
        while batch:
            part = batch[:fitting]
            images = _sampled(model, part, sampling, seed, resolution, bank)
            if images is None:
                fitting = len(part) // 2
                continue
            batch = batch[len(part) :]
            yield from zip(part, images, strict=True)
            if progress:
                progress(len(part))


def _sampled(
    model: Any,
    batch: Sequence[Job],
    sampling: Sampling,
    seed: int,
    resolution: int | tuple[int, int] | None,
    bank: AdapterBank | None,
) -> list[Image.Image] | None:
    """The images of a batch; None: memory ran out, of an accelerator or a CPU, and fewer at a time may fit.

    Raises:
        UserError: memory does not hold one image; it names what saves some.
    """
    negative_prompts = [_negative(job, sampling) for job in batch]
    try:
        with torch.no_grad(), matching_dtypes(model), _adapters(bank, batch):
            output = model(
                prompt=[job.prompt for job in batch],
                num_inference_steps=sampling.steps,
                **family_of(model).call_arguments(sampling.guidance, negative_prompts),
                generator=[generator(_first(job.seed, seed), job.stream, job.k) for job in batch],
                output_type="pt",
                **_size_and_condition(batch, sampling, resolution),
            )
        return to_images(model, output.images)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            ways = ("a smaller --resolution", "--dtype bf16", "--offload model")
            raise UserError(f"Out of memory ({first_line(error)}). Try {', '.join(ways)}.") from error
    # Out of the handler, whose error keeps the tensors of its frames alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out, of an accelerator or of the CPU."""
    kinds = (
        "MPS backend out of memory",
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(kind in str(error) for kind in kinds)


def _negative(job: Job, sampling: Sampling) -> str:
    return _first(job.negative_prompt, sampling.negative_prompt)


def _batches(jobs: Iterable[Job], batch_size: int, sort_of: Callable[[Job], Any]) -> Iterator[list[Job]]:
    """Neighbours with hints of one size, and of one sort, together."""
    for _, alike in groupby(jobs, key=lambda job: (None if job.hint is None else job.hint.shape, sort_of(job))):
        while batch := list(islice(alike, batch_size)):
            yield batch


def _adapters(bank: AdapterBank | None, batch: Sequence[Job]) -> AbstractContextManager[None]:
    if bank is None:
        return nullcontext()
    scales = [job.scale for job in batch]
    return bank.select([job.adapter for job in batch], None if set(scales) <= {1.0} else scales)


def _first(own: T | None, common: T) -> T:
    return common if own is None else own


def _size_and_condition(
    batch: Sequence[Job], sampling: Sampling, resolution: int | tuple[int, int] | None
) -> dict[str, Any]:
    hints = [job.hint for job in batch if job.hint is not None]
    if not hints:
        width, height = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        return {"height": height, "width": width}
    assert isinstance(sampling, ControllableSampling)
    return {
        "image": torch.stack(hints),
        "height": hints[0].shape[1],
        "width": hints[0].shape[2],
        "condition_scale": sampling.condition_scale,
        "control_guidance_start": sampling.condition_start,
        "control_guidance_end": sampling.condition_end,
    }


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
    """During training, a half-precision denoiser stands between text encoders and a VAE in full precision."""
    dtype = denoiser_of(pipeline).dtype
    mixed = dtype in (torch.float16, torch.bfloat16) and pipeline.vae.dtype != dtype
    # Not `pipeline.device`, which is "meta" where layers are offloaded.
    return torch.autocast(pipeline._execution_device.type, dtype if mixed else torch.bfloat16, enabled=mixed)


def slug(prompt: str) -> str:
    """A short, readable and unambiguous part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{short_digest(prompt, size=3)}".lstrip("-")

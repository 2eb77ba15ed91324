"""Requests for images by many adapters -> a folder of images, in batches across the adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.adapters.adapter_bank import AdapterBank
from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import read_text
from ether_diffusion.limits import Many, Seed, SignedStrength
from ether_diffusion.models.families.table import denoiser_of, family_of
from ether_diffusion.own_files import check_own
from ether_diffusion.pictures import save_sheets

from .folders import DTYPE, GRID, GeneratedImages, check_prompt, complete_folder
from .jobs import Job, Progress, jobs_for, sample_images
from .pipelines import dtype_name
from .sampling import Sampling, check_steps

MOST_IMAGES = 1_000_000


class Request(Settings):
    """A row of a file of requests."""

    prompt: str
    adapter: str | None = None
    """A run folder, or a name on the shelf; null: the base."""
    seed: Seed = 0
    num_images: Many = 1
    scale: SignedStrength = 1.0
    negative_prompt: str | None = None
    """Null: that of the whole call."""

    def jobs(self) -> list[Job]:
        """Its images, the k-th of them as `generate` makes it of the same prompt and seed."""
        own = self.model_dump(include={"adapter", "seed", "scale", "negative_prompt"})
        return [replace(job, **own) for job in jobs_for([self.prompt], self.num_images)]


def read_requests(path: str | Path) -> list[Request]:
    """Requests from a file of JSON objects, one a line; empty lines are left out.

    Raises:
        UserError: the file cannot be read or holds no request; or a line is none, with its number.
    """
    requests = []
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            requests.append(Request.model_validate(json.loads(line), strict=True))
        except pydantic.ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            given = "" if fault["type"] == "missing" else f" {json.dumps(fault['input'], default=str):.60}"
            reason = f"{key}{given}: {fault['msg']}" if key else fault["msg"]
            keys = ", ".join(Request.model_fields)
            raise UserError(f"{path}, line {number}: {reason}; a request has {keys}.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
    if not requests:
        raise UserError(f'{path}: no request in it; expected lines as {{"adapter": "runs/dog", "prompt": "a dog"}}.')
    if (count := sum(request.num_images for request in requests)) > MOST_IMAGES:
        raise UserError(f"{path}: {count:,} images; expected at most {MOST_IMAGES:,} in a call.")
    return requests


def generate_requests(
    pipeline: DiffusionPipeline,
    bank: AdapterBank,
    requests: Sequence[Request],
    output: str | Path,
    *,
    sampling: Sampling | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    record: dict[str, Any] | None = None,
) -> GeneratedImages:
    """Generate the images of requests into a folder, as `generate` does of prompts, each with its own adapter.

    An image is the one that its adapter alone gives for its prompt and seed, to rounding: its noise is the same, and
    its last bits depend on how many images are sampled with it, as always.

    Args:
        bank: On the pipeline's UNet, with the adapters that the requests name.
        record: As for `generate`.

    Raises:
        UserError: as `generate`; or the bank lacks an adapter.
    """
    sampling = sampling or Sampling()
    check_steps(sampling, pipeline.scheduler.config, family_of(pipeline))
    check_own(Path(output) / GRID)
    common = {**sampling.model_dump(), DTYPE: dtype_name(denoiser_of(pipeline).dtype), **(record or {})}
    digits = len(str(len(requests) - 1))
    jobs: dict[str, Job] = {}
    settings: dict[str, dict[str, Any]] = {}
    rows: list[tuple[str, list[Path | Image.Image]]] = []
    for number, request in enumerate(requests):
        check_prompt(request.prompt)
        own: dict[str, Any] = {"seed": request.seed}
        if request.negative_prompt is not None:
            check_prompt(request.negative_prompt)
            own["negative_prompt"] = request.negative_prompt
        if request.adapter is not None:
            models = {"adapter": bank.digest(request.adapter), "scale": request.scale, "merged": False}
            own |= {"request": request.adapter, **models}
        files = []
        for job in request.jobs():
            file = f"{number:0{max(2, digits)}d}{job.file[2:]}"
            jobs[file] = replace(job, file=file)
            settings[file] = {"prompt": job.prompt, "k": job.k, "resolution": resolution, **common, **own}
            files.append(Path(output) / file)
        rows.append((f"{request.adapter or 'the base'}: {request.prompt}", files))

    def sample(files: Sequence[str], progress: Progress) -> Iterator[Image.Image]:
        sampled = sample_images(
            pipeline,
            [jobs[file] for file in files],
            sampling,
            seed=0,
            resolution=resolution,
            batch_size=batch_size,
            progress=progress,
            bank=bank,
        )
        return (image for _, image in sampled)

    generated = complete_folder(Path(output), settings, sample, batch_size)
    return replace(generated, sheets=save_sheets(rows, Path(output) / GRID, own=True))

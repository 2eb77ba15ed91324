"""Conditions -> a folder of images that a rerun completes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.conditions import to_hint
from ether_diffusion.errors import UserError
from ether_diffusion.models.controlnet import ConditionedPipeline
from ether_diffusion.pictures import sheet

from .conditioned import ConditionedJob, sample_conditioned
from .folders import Progress, complete_folder
from .sampling import ControllableSampling
from .sources import Source

SHOWN = 16
"""Rows of a sheet: of a whole data set it shows the first ones."""


def generate_conditioned(
    pipeline: ConditionedPipeline,
    sources: Sequence[Source],
    output: str | Path,
    *,
    images_per_source: int = 1,
    seed: int = 0,
    sampling: ControllableSampling | None = None,
    batch_size: int = 1,
    record: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw under conditions into a folder: a PNG an image with its settings inside, and `images.jsonl`.

    A source's first image is its `file` with `.png`, the k-th after it ends in `-0k.png`. Files that are complete and
    were made with the same settings are kept. Returns the files in order, source by source. One that is black or holds
    NaN says so as its `fault`.

    Args:
        record: Facts to keep with each image beside the settings: base, the digests of adapter and encoder.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings; or two sources have
            the same file.
    """
    sampling, output = sampling or ControllableSampling(), Path(output)
    jobs = {_file(source, k): (source, k) for source in sources for k in range(images_per_source)}
    if len(jobs) < len(sources) * images_per_source:
        raise UserError(f"{output}: two conditions would be drawn into one file; expected names of their own.")
    common = {"seed": seed, **sampling.model_dump(), **(record or {})}
    settings = {
        file: {
            "name": source.name,
            "prompt": source.prompt,
            "k": k,
            "width": source.size[0],
            "height": source.size[1],
            "condition": source.digest,
            **common,
        }
        for file, (source, k) in jobs.items()
    }

    def drawn(files: Sequence[str], progress: Progress) -> Iterator[Image.Image]:
        todo = (
            ConditionedJob(source.name, source.prompt, to_hint(source.open().condition), k)
            for source, k in map(jobs.__getitem__, files)
        )
        images = sample_conditioned(pipeline, todo, sampling, seed=seed, batch_size=batch_size, progress=progress)
        return (image for _, image in images)

    return complete_folder(output, settings, drawn)


def conditioned_sheet(
    sources: Sequence[Source], columns: Sequence[tuple[str, Sequence[Path]]], cell: int | None = None
) -> Image.Image:
    """A row a source, the first ones: its condition, its images from each of the columns, and the real photo.

    Args:
        columns: (what they are, files), the same number of files for every source, source by source.
        cell: As for `sheet`.
    """
    rows = []
    for place, source in enumerate(sources[:SHOWN]):
        opened = source.open()
        images, titles = [opened.condition], ["condition"]
        for title, files in columns:
            each = len(files) // len(sources)
            images += [Image.open(file).convert("RGB") for file in files[place * each : (place + 1) * each]]
            titles.append(title)
        if opened.photo is not None:
            images.append(opened.photo)
            titles.append("photo")
        rows.append((f"{source.name}: {source.prompt} [{' | '.join(titles)}]", images))
    return sheet(rows, cell)


def _file(source: Source, k: int) -> str:
    return f"{source.file}{f'-{k:02d}' * (k > 0)}.png"

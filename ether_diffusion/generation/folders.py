"""Prompts or conditions -> a folder of images, which a rerun completes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.ahead import read_ahead, write_behind
from ether_diffusion.data.conditions import to_hint
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import read_text
from ether_diffusion.models.controlnet import ConditionedPipeline
from ether_diffusion.models.families.table import denoiser_of, family_of
from ether_diffusion.own_files import check_own, write_own
from ether_diffusion.pictures import Row, check_marked, read_settings, save_png, save_sheets
from ether_diffusion.progress import progress_bar
from ether_diffusion.version import __version__

from .jobs import Fault, Job, Progress, fault, jobs_for, sample_images
from .pipelines import dtype_name
from .sampling import ControllableSampling, Sampling, check_steps
from .sources import Source

DTYPE = "dtype"
"""The setting of an image that names the denoiser's precision, as `--dtype`: in another one it is another image."""
SHOWN = 16
"""Rows of a sheet of conditions: for a whole data set it shows the first ones."""
MODELS = ("adapter", "weight_changes", "condition_encoder")
"""The settings that name what changed the base. An image that records one is no image of the base alone."""
GRID, LIST = "grid.png", "images.jsonl"
LONGEST_PROMPT = 100_000
"""In characters; a PNG cannot be read with more text in it."""


@dataclass(frozen=True)
class GeneratedImages:
    """All images of a call of `generate` or `generate_conditioned`, sampled or kept."""

    files: list[Path]
    """In order: prompt by prompt, or source by source."""
    faults: dict[Path, Fault]
    """Those that are black or hold NaN, as was known when they were sampled."""
    sheets: list[Path] = field(default_factory=list)
    """`grid.png`, and its further pages."""


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    output: str | Path,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    record: dict[str, Any] | None = None,
) -> GeneratedImages:
    """Generate images from prompts into a folder: a PNG an image with its settings inside, `grid.png`, `images.jsonl`.

    Files that are complete and were made with the same settings are kept. An image that is black or holds NaN has a
    `fault`, in its file, in `images.jsonl` and in the result.

    Args:
        resolution: Side in pixels; default: the base's.
        record: Facts to keep with each image next to the settings: base, adapter, its digest.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings.
    """
    jobs = jobs_for(prompts, images_per_prompt)
    facts = {job.file: {"prompt": job.prompt, "k": job.k, "resolution": resolution} for job in jobs}
    by_file = {job.file: job for job in jobs}
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "resolution": resolution, "record": record}
    check_own(Path(output) / GRID)
    generated = _generate(pipeline, facts, by_file.__getitem__, Path(output), sampling or Sampling(), **options)
    rows = [
        (prompt, generated.files[row * images_per_prompt : (row + 1) * images_per_prompt])
        for row, prompt in enumerate(prompts)
    ]
    return replace(generated, sheets=save_sheets(rows, Path(output) / GRID, own=True))


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
) -> GeneratedImages:
    """Generate images under conditions into a folder, as `generate` does from prompts, without a grid.

    A source's first image is its `file` with `.png`, the k-th after it ends in `-0k.png`.

    Args:
        record: Facts to keep with each image next to the settings: base, the digests of adapter and encoder.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings; or two sources have
            the same file.
    """
    jobs = {_file(source, k): (source, k) for source in sources for k in range(images_per_source)}
    if len(jobs) < len(sources) * images_per_source:
        raise UserError(f"{output}: two conditions would write the same file; give each its own name.")
    facts = {
        file: {
            "name": source.name,
            "prompt": source.prompt,
            "k": k,
            "width": source.size[0],
            "height": source.size[1],
            "condition": source.digest,
        }
        for file, (source, k) in jobs.items()
    }

    def job(file: str) -> Job:
        source, k = jobs[file]
        return Job(source.prompt, k, file, source.name, to_hint(source.open().condition))

    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "record": record}
    return _generate(pipeline, facts, job, Path(output), sampling or ControllableSampling(), **options)


def _generate(
    pipeline: DiffusionPipeline,
    facts: Mapping[str, dict[str, Any]],
    job: Callable[[str], Job],
    output: Path,
    sampling: Sampling,
    *,
    seed: int,
    record: dict[str, Any] | None,
    **options: Any,
) -> GeneratedImages:
    """Complete a folder with the job of each file, and the facts that set the files apart in their settings."""
    check_steps(sampling, pipeline.scheduler.config, family_of(pipeline))
    for own in facts.values():
        check_prompt(own["prompt"])
    common = {"seed": seed, **sampling.model_dump(), DTYPE: dtype_name(denoiser_of(pipeline).dtype), **(record or {})}

    def sample(files: Sequence[str], progress: Progress) -> Iterator[Image.Image]:
        wanted = read_ahead(job, files, options["batch_size"])
        sampled = sample_images(pipeline, wanted, sampling, seed=seed, progress=progress, **options)
        return (image for _, image in sampled)

    settings = {file: {**own, **common} for file, own in facts.items()}
    return complete_folder(output, settings, sample, options["batch_size"])


def complete_folder(
    output: Path,
    settings: Mapping[str, dict[str, Any]],
    sample: Callable[[Sequence[str], Progress], Iterator[Image.Image]],
    batch_size: int = 1,
) -> GeneratedImages:
    """Make a folder hold these files: keep those that are whole, sample the others, and list all in `images.jsonl`.

    Args:
        settings: Of each file, by its name in the folder; kept within it.
        sample: Yields the images of the files of these names in their order, and reports its progress.
        batch_size: So many images are sampled at a time. A batch of which one is missing is sampled whole, because an
            image's last bits depend on how many others are sampled with it.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings, or a file that is not
            ours.
    """
    check_own(output / LIST)
    missing, rows = set[str](), {file: {"file": file, **wanted} for file, wanted in settings.items()}
    for file, wanted in settings.items():
        path = output / file
        found = read_settings(path) if path.exists() else None
        if found is None:
            check_marked(path)
            missing.add(file)
            continue
        _check_same(path, found, wanted)
        rows[file][DTYPE] = found.get(DTYPE)
        if found.get("fault"):
            rows[file]["fault"] = found["fault"]
    output.mkdir(parents=True, exist_ok=True)
    names = list(settings)
    batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]
    sampled = [file for batch in batches if not missing.isdisjoint(batch) for file in batch]
    shown = progress_bar(len(settings), "images", "image", initial=len(settings) - len(sampled))
    with shown as bar, write_behind(save_png) as save:
        for file, image in zip(sampled, sample(sampled, bar.update), strict=True):
            if file not in missing:
                continue
            found_fault = {"fault": fault(image)} if fault(image) else {}
            rows[file] |= found_fault
            save(image, output / file, {**settings[file], **found_fault, "ether_diffusion": __version__})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    write_own(output / LIST, lines)
    faults = {output / file: row["fault"] for file, row in rows.items() if "fault" in row}
    return GeneratedImages([output / file for file in settings], faults)


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that no PNG can record. Raises UserError."""
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"a prompt of {len(prompt):,} characters; expected at most {LONGEST_PROMPT:,}.")


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    # A file that records no precision is kept, and listed without one.
    ignored = (DTYPE,) if found.get(DTYPE) is None else ()
    keys = dict.fromkeys((*wanted, *MODELS))
    different = next((key for key in keys if found.get(key) != wanted.get(key) and key not in ignored), None)
    if different is not None:
        raise UserError(
            f"{path} was made with {different} = {found.get(different)!r}, not {wanted.get(different)!r}. Choose "
            "another --output, or delete the file."
        )


def _file(source: Source, k: int) -> str:
    return f"{source.file}{f'-{k:02d}' * (k > 0)}.png"


def conditioned_rows(sources: Sequence[Source], columns: Sequence[tuple[str, Sequence[Path]]]) -> list[Row]:
    """For a contact sheet: of each of the first sources its condition, its images from each of the columns, and the
    real photo.

    Args:
        columns: (title, files), with the same number of files for every source, source by source.
    """
    rows: list[Row] = []
    for place, source in enumerate(sources[:SHOWN]):
        opened = source.open()
        images: list[Image.Image | Path] = [opened.condition]
        titles = ["condition"]
        for title, files in columns:
            each = len(files) // len(sources)
            images += files[place * each : (place + 1) * each]
            titles.append(title)
        if opened.photo is not None:
            images.append(opened.photo)
            titles.append("photo")
        rows.append((f"{source.name}: {source.prompt} [{' | '.join(titles)}]", images))
    return rows


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines and lines that start with # are left out.

    Raises:
        UserError: the file cannot be read, or holds no prompt.
    """
    lines = read_text(Path(path)).split("\n")
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it; expected one a line.")
    return prompts

"""Prompts -> a folder of images that a rerun completes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.pictures import read_settings, save_png, sheet
from ether_diffusion.progress import progress_bar
from ether_diffusion.version import __version__

from .prompted import Job, fault, jobs_for, sample_images
from .sampling import Sampling

Progress = Callable[[int], Any]


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    output: str | Path,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    record: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw prompts into a folder: a PNG an image with its settings inside, `grid.png`, and `images.jsonl`.

    Files that are complete and were made with the same settings are kept. Returns the files in order. One that is
    black or holds NaN says so as its `fault`, in the file and in `images.jsonl`.

    Args:
        record: Facts to keep with each image beside the settings: base, adapter, its digest.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings.
    """
    sampling, output = sampling or Sampling(), Path(output)
    jobs = {job.file: job for job in jobs_for(prompts, images_per_prompt)}
    common = {"seed": seed, "resolution": resolution, **sampling.model_dump(), **(record or {})}

    def drawn(files: Sequence[str], progress: Progress) -> Iterator[Image.Image]:
        todo = [jobs[file] for file in files]
        options: dict[str, Any] = {"seed": seed, "resolution": resolution, "batch_size": batch_size}
        return (image for _, image in sample_images(pipeline, todo, sampling, **options, progress=progress))

    settings = {file: {"prompt": job.prompt, "k": job.k, **common} for file, job in jobs.items()}
    paths = complete_folder(output, settings, drawn)
    save_png(grid(output, list(jobs.values())), output / "grid.png")
    return paths


def complete_folder(
    output: Path,
    settings: Mapping[str, dict[str, Any]],
    drawn: Callable[[Sequence[str], Progress], Iterator[Image.Image]],
) -> list[Path]:
    """Make a folder hold these files: keep those that are whole, draw the others, and list all in `images.jsonl`.

    Args:
        settings: Of each file, by its name in the folder; kept within it.
        drawn: Draws the files of these names in their order, and tells `progress` how many are done.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings.
    """
    todo, faults = [], {}
    for file, wanted in settings.items():
        path = output / file
        found = read_settings(path) if path.exists() else None
        if found is not None:
            _check_same(path, found, wanted)
            faults[file] = found.get("fault")
        else:
            todo.append(file)
    output.mkdir(parents=True, exist_ok=True)
    with progress_bar(len(settings), "images", "image", initial=len(settings) - len(todo)) as bar:
        for file, image in zip(todo, drawn(todo, bar.update), strict=True):
            faults[file] = fault(image)
            told = {"fault": faults[file]} if faults[file] else {}
            save_png(image, output / file, {**settings[file], **told, "ether_diffusion": __version__})
    rows = [{"file": file, **wanted} for file, wanted in settings.items()]
    rows = [row | ({"fault": faults[row["file"]]} if faults[row["file"]] else {}) for row in rows]
    _write_lines(output / "images.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    return [output / file for file in settings]


def grid(folder: Path, jobs: Sequence[Job]) -> Image.Image:
    """One row a prompt."""
    rows: dict[str, list[Image.Image]] = {}
    for job in jobs:
        rows.setdefault(job.file[: -len("-00.png")], []).append(Image.open(folder / job.file).convert("RGB"))
    captions = {job.file[: -len("-00.png")]: job.prompt for job in jobs}
    return sheet([(captions[key], images) for key, images in rows.items()])


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error}).") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it; expected one a line.")
    return prompts


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{path} was made with {key} = {found.get(key)!r}, not {wanted[key]!r}. Choose another --output, or delete "
            "the file."
        )


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_whole(path, "".join(line + "\n" for line in lines))

"""Prompts -> a folder of images that a rerun completes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.pictures import read_settings, save_png, sheet
from ether_diffusion.progress import progress_bar
from ether_diffusion.version import __version__

from .drawing import Job, draw, fault, jobs_for
from .sampling import Sampling


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
    jobs = jobs_for(prompts, images_per_prompt)
    common = {"seed": seed, "resolution": resolution, **sampling.model_dump(), **(record or {})}
    settings = {job.file: {"prompt": job.prompt, "k": job.k, **common} for job in jobs}
    todo, faults = [], {}
    for job in jobs:
        path = output / job.file
        found = read_settings(path) if path.exists() else None
        if found is not None:
            _check_same(path, found, settings[job.file])
            faults[job.file] = found.get("fault")
        else:
            todo.append(job)
    output.mkdir(parents=True, exist_ok=True)
    kept = len(jobs) - len(todo)
    with progress_bar(len(jobs), "images", "image", initial=kept) as bar:
        drawn = draw(
            pipeline, todo, sampling, seed=seed, resolution=resolution, batch_size=batch_size, progress=bar.update
        )
        for job, image in drawn:
            faults[job.file] = fault(image)
            told = {"fault": faults[job.file]} if faults[job.file] else {}
            save_png(image, output / job.file, {**settings[job.file], **told, "ether_diffusion": __version__})
    rows = [{"file": job.file, **settings[job.file]} for job in jobs]
    rows = [row | ({"fault": faults[row["file"]]} if faults[row["file"]] else {}) for row in rows]
    _write_lines(output / "images.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    save_png(grid(output, jobs), output / "grid.png")
    return [output / job.file for job in jobs]


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
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)

"""Images for a page: shrunk, encoded into the file itself, and side by side by prompt; `parts.html` writes them."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation.sources import Opened, pair_sources

from .reported_run import ImageFolder, ReportedRun

CELL, SHEET = 256, 1400  # sides in pixels to which images and sheets are shrunk
GRIDS, PROMPTS, PER_PROMPT, PHOTOS, SHEETS = 10, 30, 4, 6, 4  # limits, so that a browser can open the page
_LOSSLESS = 128  # images up to this side keep every pixel


class Picture(NamedTuple):
    """An image as a page holds it."""

    source: str
    """A data URL: PNG or JPEG."""
    description: str
    width: int
    height: int
    pixelated: bool
    """Small: enlarged without smoothing."""


Pictures = list[Picture | str]
"""Images side by side; text in the place of one says why it is not shown."""


@dataclass(frozen=True)
class ImageGrid:
    """Images of one set of prompts."""

    note: str
    """What is left out; may be empty."""
    titles: list[str]
    """Of the columns: the prompts, the conditions if there are any, then a column for each run or base."""
    rows: list[tuple[str, list[tuple[Pictures, int]]]]
    """A name, and cells: pictures, and how many columns they cover."""


@dataclass(frozen=True)
class Column:
    """Images of one run, or of its base, by what they were generated from."""

    folder: ImageFolder
    run: ReportedRun

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of `images.jsonl` by prompt; with a condition's name before it where there is one, because several
        conditions may share a prompt."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.folder.rows:
            name = f"{row['name']}: " if isinstance(row.get("name"), str) else ""
            found.setdefault(name + row["prompt"], []).append(row)
        return found

    @cached_property
    def photo_folders(self) -> list[str]:
        """The photo folders that its training learned from, as far as its config records them."""
        data = self.folder.config.get("data") or {}
        subjects = [data, *(other for other in data.get("more_subjects") or [] if isinstance(other, dict))]
        return [str(subject["instance_dir"]) for subject in subjects if subject.get("instance_dir")]

    def belongs_to(self, columns: Sequence[Column]) -> bool:
        """Whether it has the prompts of these columns, and not the photos of another subject."""
        known = [other.photo_folders for other in columns if other.photo_folders]
        fits = not self.photo_folders or not known or self.photo_folders in known
        return fits and list(self.rows) == list(columns[0].rows)

    def title(self, bases: int) -> str:
        """Its title in a grid in which `bases` columns show a base."""
        if self.folder.is_of_base:
            return "base alone" if bases == 1 else f"base alone ({self.run.label})"
        return self.run.named(self.folder.place, "evaluation/after")


def embedded(image: Image.Image, description: str, side: int = CELL) -> Picture:
    """The image within `side` pixels, as PNG if it is small, else as JPEG."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    small = max(image.size) <= _LOSSLESS
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/{'png' if small else 'jpeg'};base64,{data}"
    return Picture(source, description, image.width, image.height, small)


def image_grids(runs: Sequence[ReportedRun]) -> tuple[list[ImageGrid], int]:
    """The first `GRIDS` grids, one for each set of prompts and photos, and how many there are."""
    grids: list[list[Column]] = []
    seen: list[set[str]] = []
    for run in runs:
        # The base comes first: reading from left to right shows what training changed.
        for folder in sorted(run.images, key=lambda folder: not folder.is_of_base):
            if folder.is_of_base:
                images = {json.dumps(row, sort_keys=True) for row in folder.rows}
                if any(images <= others for others in seen):
                    continue  # the same images of the base are in another run's column
                seen.append(images)
            column = Column(folder, run)
            fitting = next((columns for columns in grids if column.belongs_to(columns)), None)
            if fitting is None:
                grids.append([column])
            else:
                fitting.append(column)
    return [_grid(columns) for columns in grids[:GRIDS]], len(grids)


def sample_sheets(run: ReportedRun) -> tuple[str, list[tuple[str, Picture | str]]] | None:
    """A title, and the last of the validation sheets and a few before it with captions; None if there is none."""
    if not run.samples:
        return None
    n = len(run.samples)
    chosen = [run.samples[k] for k in sorted({round(k * (n - 1) / (SHEETS - 1)) for k in range(SHEETS)})]
    figures = [(file.stem.replace("-", " "), _shown(file, SHEET, file.stem)) for file in chosen]
    return f"While training: {run.label} ({len(chosen)} of {n} sheets)", figures


def _grid(columns: Sequence[Column]) -> ImageGrid:
    first = columns[0]
    prompts = list(first.rows)
    shown = prompts[:PROMPTS]
    conditions = _conditions_of(first.folder.config, [first.rows[prompt][0] for prompt in shown])
    bases = sum(column.folder.is_of_base for column in columns)
    titles = ["prompt", *["condition, real image"] * bool(conditions), *(column.title(bases) for column in columns)]
    rows: list[tuple[str, list[tuple[Pictures, int]]]] = []
    if any(column.photo_folders for column in columns):
        # Neighbours with the same photos show them once.
        groups = itertools.groupby(columns, key=lambda column: column.photo_folders)
        cells = [(folders, len(list(same))) for folders, same in groups]
        rows.append(("photos", [([one for name in folders for one in _photos(name)], span) for folders, span in cells]))
    for prompt in shown:
        condition = conditions.get(first.rows[prompt][0].get("name", ""))
        pictures = [_condition(condition)] * bool(conditions) + [_generated(column, prompt) for column in columns]
        rows.append((prompt, [(cell, 1) for cell in pictures]))
    left_out = [f"the first {len(shown)} of {len(prompts):,} prompts"] * (len(shown) < len(prompts))
    most = max(len(images) for column in columns for images in column.rows.values())
    left_out += [f"the first {PER_PROMPT} of {most:,} images of each prompt"] * (most > PER_PROMPT)
    return ImageGrid(f"Shown: {', '.join(left_out)}." if left_out else "", titles, rows)


def _conditions_of(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Opened]:
    """Conditions and real images by name; without those that are missing or have changed since.

    Args:
        config: Of a controllable run.
        rows: Of the `images.jsonl` of square images generated under a data set's conditions.
    """
    data, validation = config.get("data") or {}, config.get("validation") or {}
    digests = {row["name"]: row["condition"] for row in rows if "name" in row and "condition" in row}
    if not digests or not data.get("dataset_dir"):
        return {}
    for split in dict.fromkeys([validation.get("split") or "validation", data.get("split") or "training"]):
        try:
            pairs = find_pairs(
                data["dataset_dir"],
                split=split,
                condition=data.get("condition", "auto"),
                caption_template="{name}",  # the rows hold the captions; a missing one must be no error here
                cache_dir=data.get("cache_dir"),
            )
            pairs = replace(pairs, pairs=tuple(pair for pair in pairs.pairs if pair.name in digests))
            sources = pair_sources(pairs, rows[0]["height"])
            found = {one.name: one.open() for one in sources if one.digest == digests[one.name]}
        except UserError:
            continue
        if found:
            return found
    return {}


def _generated(column: Column, prompt: str) -> Pictures:
    """The images of a prompt, each with the fault that `images.jsonl` records of it."""
    pictures: Pictures = []
    for row in column.rows[prompt][:PER_PROMPT]:
        pictures.append(_shown(column.folder.folder / row["file"], CELL, prompt))
        pictures += [str(row["fault"])] if row.get("fault") else []
    return pictures


def _condition(opened: Opened | None) -> Pictures:
    """A condition, and the real image that belongs to it."""
    if opened is None:
        return []
    photo = [embedded(opened.photo, "real image")] if opened.photo else []
    return [embedded(opened.condition, "condition"), *photo]


def _photos(folder: str) -> Pictures:
    try:
        photos = find_photos(folder).photos
    except UserError as error:
        return [str(error).splitlines()[0]]
    return [embedded(photo.open(), f"{folder}: {photo.name}") for photo in photos[:PHOTOS]]


def _shown(file: Path, side: int, description: str) -> Picture | str:
    if not file.is_file():  # a pipe would be waited for
        return f"{file.name} is missing"
    try:
        with Image.open(file) as image:
            return embedded(image, description, side)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f"{file.name} cannot be read"

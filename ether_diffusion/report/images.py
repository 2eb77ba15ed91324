"""Images inside a page: shrunk, encoded into the file itself, and set side by side by their prompts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation.sources import Opened

from .condition_images import conditions_of
from .markup import Markup, element, joined
from .reported_run import ImageFolder, ReportedRun

CELL, SHEET = 256, 1400  # sides in pixels to which images and sheets are shrunk
GRIDS, PROMPTS, PER_PROMPT, PHOTOS, SHEETS = 10, 30, 4, 6, 4  # at most so many: a page has to open
_LOSSLESS = 128  # images up to this side are kept pixel by pixel


@dataclass(frozen=True)
class Column:
    """Images of one run, or of the base for it, by what they were drawn from."""

    folder: ImageFolder
    run: ReportedRun

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Under their prompts; where several conditions may have one prompt, under condition and prompt."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.folder.rows:
            name = f"{row['name']}: " if isinstance(row.get("name"), str) else ""
            found.setdefault(name + row["prompt"], []).append(row)
        return found

    def title(self, bases: int) -> str:
        """For a grid in which so many columns are of the base."""
        if self.folder.is_of_base:
            return "base alone" if bases == 1 else f"base alone ({self.run.label})"
        return self.run.named(self.folder.place, "evaluation/after")


def embedded(image: Image.Image, description: str, side: int = CELL) -> Markup:
    """An `<img>` that holds the image. One larger than `side` is shrunk; small ones lose nothing."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    small = max(image.size) <= _LOSSLESS
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return element(
        "img",
        src=f"data:image/{'png' if small else 'jpeg'};base64,{data}",
        alt=description,
        width=image.width,
        height=image.height,
        class_="pixels" if small else None,
    )


def image_grids(runs: Sequence[ReportedRun]) -> list[Markup]:
    """A grid for each set of prompts and photos: a row a prompt, a column a run or the base; with them what is real."""
    grids: list[list[Column]] = []
    seen: list[set[str]] = []
    for run in runs:
        # The base comes first: what training changed is read from left to right.
        for folder in sorted(run.images, key=lambda folder: not folder.is_of_base):
            if folder.is_of_base:
                images = {json.dumps(row, sort_keys=True) for row in folder.rows}
                if any(images <= others for others in seen):
                    continue  # another run is shown beside the same images
                seen.append(images)
            column = Column(folder, run)
            fitting = next((columns for columns in grids if _belongs(column, columns)), None)
            if fitting is None:
                grids.append([column])
            else:
                fitting.append(column)
    shown = [_grid(columns) for columns in grids[:GRIDS]]
    if len(grids) > GRIDS:
        shown.append(element("p", f"Shown: the first {GRIDS} of {len(grids)} sets of prompts.", class_="note"))
    return shown


def _belongs(column: Column, columns: Sequence[Column]) -> bool:
    """Whether a column is of a grid's prompts, and not of another subject, as far as it tells."""
    photos = _photo_folders(column.folder.config)
    told = [known for other in columns if (known := _photo_folders(other.folder.config))]
    return list(column.rows) == list(columns[0].rows) and (not photos or not told or photos in told)


def sample_sheets(run: ReportedRun) -> Markup | None:
    """Sheets drawn while training: the last and a few before it."""
    if not run.samples:
        return None
    n = len(run.samples)
    chosen = [run.samples[k] for k in sorted({round(k * (n - 1) / (SHEETS - 1)) for k in range(SHEETS)})]
    figures = [
        element("figure", element("figcaption", file.stem.replace("-", " ")), _shown(file, SHEET, file.stem))
        for file in chosen
    ]
    title = f"While training: {run.label} ({len(chosen)} of {n} sheets)"
    return element("details", element("summary", title), element("div", *figures, class_="sheets"))


def _grid(columns: Sequence[Column]) -> Markup:
    prompts = list(columns[0].rows)
    shown = prompts[:PROMPTS]
    conditions = conditions_of(columns[0].folder.config, [columns[0].rows[prompt][0] for prompt in shown])
    bases = sum(column.folder.is_of_base for column in columns)
    titles = ["prompt", *["condition, real image"] * bool(conditions), *(column.title(bases) for column in columns)]
    body = [_photo_row(columns)]
    for prompt in shown:
        first = columns[0].rows[prompt][0]
        cells = [_condition_cell(conditions.get(first.get("name", "")))] if conditions else []
        for column in columns:
            rows = column.rows[prompt][:PER_PROMPT]
            cells.append(element("td", *(_drawn(column.folder.folder, row, prompt) for row in rows)))
        body.append(element("tr", element("th", prompt, scope="row"), *cells))
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    table = element("table", element("thead", head), element("tbody", *body), class_="images")
    left_out = [f"the first {len(shown)} of {len(prompts):,} prompts"] * (len(shown) < len(prompts))
    most = max(len(rows) for column in columns for rows in column.rows.values())
    left_out += [f"the first {PER_PROMPT} of {most:,} images of each prompt"] * (most > PER_PROMPT)
    note = element("p", f"Shown: {', '.join(left_out)}.", class_="note") if left_out else None
    return joined(note, element("div", table, class_="scroll"))


def _condition_cell(opened: Opened | None) -> Markup:
    """The condition, and the real image that it belongs to."""
    if opened is None:
        return element("td")
    photo = embedded(opened.photo, "real image") if opened.photo else None
    return element("td", embedded(opened.condition, "condition"), photo)


def _drawn(folder: Path, row: dict[str, Any], prompt: str) -> Markup:
    fault = element("span", row["fault"], class_="fault") if row.get("fault") else None
    return joined(_shown(folder / row["file"], CELL, prompt), fault)


def _shown(file: Path, side: int, description: str) -> Markup:
    try:
        with Image.open(file) as image:
            return embedded(image, description, side)
    except FileNotFoundError:
        return element("span", f"{file.name} is missing", class_="fault")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return element("span", f"{file.name} cannot be read", class_="fault")


def _photo_row(columns: Sequence[Column]) -> Markup | None:
    """The real photos, once for neighbours that have the same; None if no run tells of photos."""
    cells: list[tuple[list[str], int]] = []
    for column in columns:
        folders = _photo_folders(column.folder.config)
        if cells and cells[-1][0] == folders:
            cells[-1] = (folders, cells[-1][1] + 1)
        else:
            cells.append((folders, 1))
    if not any(folders for folders, _ in cells):
        return None
    shown = [element("td", *map(_photos, folders), colspan=span) for folders, span in cells]
    return element("tr", element("th", "photos", scope="row"), *shown)


def _photo_folders(config: dict[str, Any]) -> list[str]:
    data = config.get("data") or {}
    others = data.get("more_subjects") or []
    subjects = [data, *(other for other in others if isinstance(other, dict))]
    return [str(subject["instance_dir"]) for subject in subjects if subject.get("instance_dir")]


def _photos(folder: str) -> Markup:
    try:
        photos = find_photos(folder).photos
    except UserError as error:
        return element("span", str(error).splitlines()[0], class_="fault")
    return joined(*(embedded(photo.open(), f"{folder}: {photo.name}") for photo in photos[:PHOTOS]))

"""A doctor for folders of pairs: reads every file, and counts what a training would stumble over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.data.builtin import builtin_scenes
from ether_diffusion.data.captions import read_caption
from ether_diffusion.data.conditions import labels_of, map_fault, open_raw, palette_name
from ether_diffusion.data.findings import Findings, SplitFindings
from ether_diffusion.data.frames import Size
from ether_diffusion.data.pair_captions import lines_file, match_rows, parsed, texts_in
from ether_diffusion.data.pair_files import Files, find_layout
from ether_diffusion.data.pairs import files_by_lines, kind_of
from ether_diffusion.data.palettes import Classes, read_classes
from ether_diffusion.data.photos import open_photo
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.progress import progress_bar

_ORIENTATION = 274  # EXIF's tag


def check_folder(
    folder: str | Path,
    *,
    split: str | None = None,
    condition: str = "auto",
    captions: Path | None = None,
    cache_dir: Path | None = None,
    shown: bool = False,
) -> Findings:
    """Reads every file of a folder of pairs. Arguments are those of `find_pairs`; without split, all are checked.

    Args:
        shown: A progress bar.

    Raises:
        UserError: There is nothing to check: no such folder or split, or conditions that may be one thing or another.
    """
    path = builtin_scenes(str(folder), cache_dir) if str(folder).startswith("builtin:") else Path(folder).expanduser()
    layout = find_layout(path)
    made = condition not in ("auto", "labels", "image")
    if made:
        Preprocessor(condition)  # an unknown name stops here
    results, classes, kind = [], None, condition
    for name in [split] if split else layout.splits or ["training"]:
        images, conditions = layout.of_split(name)
        if layout.conditions is None and not made:
            files = files_by_lines(layout, name, captions)
            images = {file.name: file.image for file in files if file.image}
            conditions = {file.name: file.condition for file in files if file.condition}
        names = dict.fromkeys(images) if made else dict.fromkeys([*conditions, *images])
        files = [Files(name, images.get(name), None if made else conditions.get(name)) for name in names]
        kind = condition if made else kind_of(layout, files, condition)
        classes = read_classes(layout.folder) if kind == "labels" else None
        found = SplitFindings(name, kind, len(images), 0 if made else len(conditions))
        if not made:
            _check_names(found, images, conditions)
        found.pairs = [file for file in files if made or (file.condition and (file.image or not images))]
        _check_captions(found, files, layout.folder, captions)
        _check_files(found, files, classes, as_stored=layout.is_ade20k and not made, shown=shown)
        results.append(found)
    described = "ADE20K's layout" if layout.is_ade20k else "a folder of pairs"
    if classes is not None:
        described += f", label maps of {len(classes)} classes, {palette_name(classes.palette)}"
    elif made:
        described = f"photos, conditions made of them by {condition}"
    else:
        described += ", conditions are images"
    return Findings(layout.folder, described, classes, layout.is_ade20k and not made, results)


def _check_names(found: SplitFindings, images: Mapping[str, Path], conditions: Mapping[str, Path]) -> None:
    for name, path in images.items():
        if name not in conditions:
            found.add("images without condition", path.name)
    if not images:
        found.remarks.append("no images at all: conditions to draw from, not to train on")
        return
    for name, path in conditions.items():
        if name not in images:
            found.add("conditions without image", path.name)


def _check_captions(found: SplitFindings, files: Sequence[Files], folder: Path, captions: Path | None) -> None:
    source = captions.expanduser() if captions else lines_file(folder, found.split)
    if source is not None and not source.exists():
        raise UserError(f"captions: {source}: no such file or folder")
    if source is not None and source.is_file():
        named = _check_lines(found, files, folder, source)
    else:
        named = _check_texts(found, files, [source] if source else {f.image.parent: None for f in files if f.image})
    where = source.name if source else "text files beside the images"
    found.captions = f"{len(named):,} of {len(files):,} images, from {where}" if named else "none"
    missing = [file.name for file in files if file.name not in named]
    for name in missing if named else []:
        found.add("images without caption, which data.caption_template can stand in for", name, fault=False)
    if not named:
        found.captions += "; `ether-diffusion data caption` writes some, or data.caption_template stands in"


def _check_lines(found: SplitFindings, files: Sequence[Files], folder: Path, source: Path) -> set[str]:
    rows = []
    for row in parsed(source):
        if isinstance(row, UserError):
            found.add("lines of captions that cannot be used", str(row).removeprefix(f"{source}:"))
        else:
            rows.append(row)
    matches, notes = match_rows(rows, files, found.split, (folder, source.parent))
    for note in notes:
        found.remarks.append(note)
    named: set[str] = set()
    for row, name in matches:
        if not row.caption:
            found.add("empty captions", f"{source.name}:{row.number}")
        elif name in named:
            found.add("second captions for one image", f"{source.name}:{row.number}")
        named.add(name)
    matching = {row.number for row, _ in matches}
    for row in rows:
        if row.number not in matching:
            # Lines for all splits in one file are well; lines that match nothing at all are a mistake.
            what = "lines of captions that name no image here"
            found.add(what, f"{source.name}:{row.number} {row.image or row.condition}", fault=not matches)
    return named


def _check_texts(found: SplitFindings, files: Sequence[Files], folders: Iterable[Path]) -> set[str]:
    named: set[str] = set()
    names = {file.name for file in files}
    for folder in folders:
        for name, path in texts_in(folder).items():
            if name not in names:
                found.add("text files that belong to no image", path.name, fault=False)
                continue
            try:
                read_caption(path)
                named.add(name)
            except UserError as error:
                found.add("empty or unreadable captions", str(error).removeprefix(f"{path.parent}/"))
    return named


@dataclass
class _Seen:
    """What one pair's files hold."""

    size: Size | None = None
    counts: np.ndarray | None = None
    remarks: list[tuple[str, str, bool]] = field(default_factory=list)
    """What, example, fault."""


def _check_files(
    found: SplitFindings, files: Sequence[Files], classes: Classes | None, *, as_stored: bool, shown: bool
) -> None:
    found.pixels = np.zeros(len(classes) + 1 if classes else 1, np.int64)
    look = partial(_look, classes=classes, as_stored=as_stored)
    workers = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock
    with (
        progress_bar(len(files), f"reading {found.split}", "pair", shown=shown) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for seen in pool.map(look, files):
            bar.update()
            for what, example, fault in seen.remarks:
                found.add(what, example, fault=fault)
            if seen.size:
                found.sizes.append(seen.size)
            if seen.counts is not None:
                found.pixels += seen.counts


def _look(files: Files, *, classes: Classes | None, as_stored: bool) -> _Seen:
    seen = _Seen()
    image_size = condition_size = None
    if files.image:
        try:
            image_size = open_photo(files.image, upright=not as_stored).size
            with Image.open(files.image) as stored:
                turned = stored.getexif().get(_ORIENTATION, 1) != 1
        except UserError as error:
            seen.remarks.append(("damaged images", str(error).removeprefix(f"{files.image.parent}/"), True))
        else:
            if turned and classes is not None:
                what = "images with an EXIF orientation, which " + (
                    "is passed over, as ADE20K's own tools do" if as_stored else "is applied; is it to their maps?"
                )
                seen.remarks.append((what, files.image.name, False))
    if files.condition:
        try:
            condition = open_raw(files.condition) if classes else open_photo(files.condition)
        except UserError as error:
            seen.remarks.append(("damaged conditions", str(error).removeprefix(f"{files.condition.parent}/"), True))
        else:
            condition_size = condition.size
            if classes is not None:
                _look_at_map(seen, condition, files.condition, classes)
    if image_size and condition_size and image_size != condition_size:
        sizes = " and ".join(f"{width} x {height}" for width, height in (image_size, condition_size))
        seen.remarks.append(("images and conditions of different sizes", f"{files.name} {sizes}", True))
    seen.size = image_size or condition_size
    return seen


def _look_at_map(seen: _Seen, image: Image.Image, path: Path, classes: Classes) -> None:
    fault = map_fault(image, classes.palette)
    if fault is not None:
        seen.remarks.append((fault.kind, f"{path.name}: {fault.detail}", True))
        return
    labels = labels_of(image, classes.palette)
    if labels is not None:
        seen.counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
        if seen.counts[0] == labels.size:
            seen.remarks.append(("maps without a single label", path.name, False))

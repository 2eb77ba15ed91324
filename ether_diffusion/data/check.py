"""The check of a data set of pairs: opens every file, and counts the faults that would stop or spoil a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import Base as Exif

from ether_diffusion.data.captions import text_captions
from ether_diffusion.data.conditions import labels_of, map_fault, open_raw, palette_name
from ether_diffusion.data.findings import PHOTOS_KIND, Findings, SplitFindings
from ether_diffusion.data.frames import Size
from ether_diffusion.data.pair_captions import captions_source, collect_captions, lines_file
from ether_diffusion.data.pair_files import LAYOUTS, Pair, find_layout
from ether_diffusion.data.pairs import files_of_split, kind_of
from ether_diffusion.data.palettes import Classes, read_classes
from ether_diffusion.data.photos import PHOTOS, open_photo, photo_files
from ether_diffusion.data.preprocessors import is_preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import same_name
from ether_diffusion.progress import progress_bar

LongTexts = Callable[[Iterable[str]], str | None]
MOST_WORDS = 75
"""Each word is at least one token, and CLIP's text encoders read 77 with start and end."""


def check_folder(
    folder: str | Path,
    *,
    split: str | None = None,
    condition: str = "auto",
    captions: Path | None = None,
    cache_dir: Path | None = None,
    long_texts: LongTexts | None = None,
    shown: bool = False,
) -> Findings:
    """Open every file of a data set of pairs, or of a folder of photos alone.

    Arguments are those of `find_pairs`; without split, all are checked.

    Args:
        long_texts: Captions -> a line about those that a base's text encoder cuts, or None.
        shown: Show a progress bar.

    Raises:
        UserError: Nothing can be checked: no such folder or split, or conditions of an unclear kind.
    """
    layout = find_layout(folder, cache_dir)
    alone = layout.images == layout.folder and lines_file(layout.folder, split or "training") is None
    if alone and condition == "auto" and captions is None:
        return check_photos(layout.folder, long_texts=long_texts, shown=shown)
    computed = is_preprocessor(condition)
    ignore_exif = layout.is_ade20k and not computed
    results, classes = [], None
    for name in [split] if split else layout.splits or ["training"]:
        images, conditions = files_of_split(layout, name, condition, captions)
        files = [Pair(stem, images.get(stem), conditions.get(stem)) for stem in dict.fromkeys([*conditions, *images])]
        kind = condition if computed else kind_of(layout, files, condition)
        classes = read_classes(layout.folder) if kind == "labels" else None
        found = SplitFindings(name, kind, len(images), len(conditions))
        if not computed:
            _check_names(found, images, conditions)
        found.pairs = [file for file in files if computed or (file.condition and (file.image or not images))]
        _check_captions(found, files, layout.folder, captions, long_texts)
        _check_files(found, files, classes, ignore_exif=ignore_exif, shown=shown)
        results.append(found)
    described = "ADE20K's layout" if layout.is_ade20k else "a folder of pairs"
    if classes is not None:
        described += f", label maps of {len(classes)} classes, {palette_name(classes.palette)}"
    elif computed:
        described = f"photos, conditions computed from them by {condition}"
    else:
        described += ", conditions are images"
    return Findings(layout.folder, described, classes, ignore_exif, results)


def check_photos(folder: Path, *, long_texts: LongTexts | None = None, shown: bool = False) -> Findings:
    """Open every photo of a folder of photos of a subject, and read the captions next to them.

    Raises:
        UserError: No photos in it.
    """
    files, skipped = photo_files(folder)
    names = [Pair(same_name(file.stem), file, None) for file in files]
    if not files:
        raise UserError(f"{folder}: no photos in this folder; expected {PHOTOS}, or {LAYOUTS}")
    found = SplitFindings("training", PHOTOS_KIND, len(files), pairs=names)
    texts = text_captions((pair.name for pair in names), [folder])
    for fault in texts.faults:
        found.add(fault.kind, fault.message(fault.file.name))
    for path in texts.unused_texts:
        found.add("text files that belong to no photo", path.name, fault=False)
    for name, reason in skipped:
        if Path(name).suffix.lower() != ".txt" and reason != "hidden":
            found.add("left out, for they are no photos", f"{name} ({reason})", fault=False)
    found.captions = "none: the instance prompt is used for every photo"
    if texts.by_name:
        found.captions = f"{len(texts.by_name):,} of {len(files):,} photos (data.captions=true reads them)"
    _check_lengths(found, texts.by_name.values(), long_texts)
    _check_files(found, names, None, ignore_exif=False, shown=shown)
    return Findings(folder, "photos of a subject, for data.instance_dir", None, False, [found])


def _check_lengths(found: SplitFindings, captions: Iterable[str], long_texts: LongTexts | None) -> None:
    if long_texts is not None:
        if line := long_texts(captions):
            found.remarks.append(f"note: {line}")
        return
    kind = f"captions of more than {MOST_WORDS} words, whose end no text encoder reads"
    for caption in captions:
        if len(caption.split()) > MOST_WORDS:
            found.add(kind, f"{caption:.60}...", fault=False)


def _check_names(found: SplitFindings, images: Mapping[str, Path], conditions: Mapping[str, Path]) -> None:
    for name, path in images.items():
        if name not in conditions:
            found.add("images without condition", path.name)
    if not images:
        found.remarks.append("no images at all: conditions to generate from, not to train on")
        return
    for name, path in conditions.items():
        if name not in images:
            found.add("conditions without image", path.name)


def _check_captions(
    found: SplitFindings, files: Sequence[Pair], folder: Path, captions: Path | None, long_texts: LongTexts | None
) -> None:
    source = captions_source(folder, found.split, captions)
    collected = collect_captions(files, folder, found.split, source)
    for fault in collected.faults:
        found.add(fault.kind, fault.message(fault.file.name))
    found.remarks += collected.notes
    none_matches = len(collected.unused_rows) == len(collected.rows)
    for row in collected.unused_rows:
        # One file with the lines of all splits is fine; lines that match nothing at all are a mistake.
        example = f"{source.name if source else ''}:{row.number} {row.image or row.condition}"
        found.add("lines of captions that name no image here", example, fault=none_matches)
    for path in collected.unused_texts:
        found.add("text files that belong to no image", path.name, fault=False)
    _check_lengths(found, collected.by_name.values(), long_texts)
    count = len(collected.by_name)
    if not count:
        found.captions = "none; `ether-diffusion data caption` writes some, or data.caption_template fills in"
        return
    found.captions = f"{count:,} of {len(files):,} images, from {source.name if source else 'text files next to them'}"
    for file in files:
        if file.name not in collected.by_name:
            found.add("images without caption, where data.caption_template can fill in", file.name, fault=False)


@dataclass
class _Contents:
    """The contents of one pair's files; remarks are (kind, example, whether it is a fault)."""

    size: Size | None = None
    counts: np.ndarray | None = None
    remarks: list[tuple[str, str, bool]] = field(default_factory=list)

    def open(self, path: Path, kind: str, decode: Callable[[Path], Image.Image]) -> Image.Image | None:
        """The decoded image; None and a remark where it is damaged."""
        try:
            return decode(path)
        except UserError as error:
            self.remarks.append((f"damaged {kind}", str(error).removeprefix(f"{path.parent}/"), True))
            return None


def _check_files(
    found: SplitFindings, files: Sequence[Pair], classes: Classes | None, *, ignore_exif: bool, shown: bool
) -> None:
    found.pixels = np.zeros(len(classes) + 1 if classes else 1, np.int64)
    examine = partial(_examine, classes=classes, ignore_exif=ignore_exif)
    workers = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock
    with (
        progress_bar(len(files), f"reading {found.split}", "pair", shown=shown) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for contents in pool.map(examine, files):
            bar.update()
            for what, example, fault in contents.remarks:
                found.add(what, example, fault=fault)
            if contents.size:
                found.sizes.append(contents.size)
            if contents.counts is not None:
                found.pixels += contents.counts


def _examine(files: Pair, *, classes: Classes | None, ignore_exif: bool) -> _Contents:
    contents = _Contents()
    sizes = []
    if files.image and (image := contents.open(files.image, "images", partial(open_photo, apply_exif=not ignore_exif))):
        sizes.append(image.size)
        if classes is not None and _is_turned(files.image):
            effect = "ignored, as ADE20K's own tools do" if ignore_exif else "applied; do their maps follow it?"
            contents.remarks.append((f"images with an EXIF orientation, which is {effect}", files.image.name, False))
    if files.condition and (found := contents.open(files.condition, "conditions", open_raw if classes else open_photo)):
        sizes.append(found.size)
        if classes is not None:
            _examine_map(contents, found, files.condition, classes)
    if len(set(sizes)) > 1:
        both = " and ".join(f"{width} x {height}" for width, height in sizes)
        contents.remarks.append(("images and conditions of different sizes", f"{files.name} {both}", True))
    contents.size = sizes[0] if sizes else None
    return contents


def _is_turned(path: Path) -> bool:
    try:
        with Image.open(path) as stored:
            return stored.getexif().get(Exif.Orientation, 1) != 1
    except Exception:  # as `upright`
        return False


def _examine_map(contents: _Contents, image: Image.Image, path: Path, classes: Classes) -> None:
    fault = map_fault(image, classes.palette)
    if fault is not None:
        contents.remarks.append((fault.kind, f"{path.name}: {fault.detail}", True))
        return
    labels = labels_of(image, classes.palette)
    if labels is not None:
        contents.counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
        if contents.counts[0] == labels.size:
            contents.remarks.append(("maps without a single label", path.name, False))

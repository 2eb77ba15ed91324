"""Pairs of image and condition with a caption: ADE20K's folders, folders of pairs, or photos and a preprocessor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ether_diffusion.data.conditions import ONE_CHANNEL, off_palette, open_raw
from ether_diffusion.data.pair_captions import find_captions, lines_file, read_rows
from ether_diffusion.data.pair_files import LAYOUTS, Layout, Pair, find_layout, first_names, matched
from ether_diffusion.data.palettes import ADE20K, read_classes
from ether_diffusion.data.preprocessors import Preprocessor, is_preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import check_file, find_same, same_name


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split, in the order of their names."""

    folder: str
    split: str
    pairs: tuple[Pair, ...]
    kind: str
    """labels: label maps or maps painted with the palette; image: images as they are; or a preprocessor."""
    palette: np.ndarray | None = None
    """(N + 1, 3) uint8, row 0 for unlabelled pixels; None unless `kind` is labels."""
    names: tuple[str, ...] = ()
    """Names of the labels 1 to N, where the data set has them."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one line each."""
    ignore_exif: bool = False
    """The maps label the stored pixels, so that the images' EXIF orientation is ignored (ADE20K)."""
    cache_dir: Path | None = None
    """The folder of computed conditions; None: the user's cache."""

    def __len__(self) -> int:
        return len(self.pairs)


def find_pairs(
    dataset_dir: str | Path,
    *,
    split: str = "training",
    condition: str = "auto",
    captions: Path | None = None,
    caption_template: str | None = None,
    cache_dir: Path | None = None,
    limit: int | None = None,
) -> Pairs:
    """The pairs of a split. Lists files and reads captions; images and maps are opened when a sample shows them.

    Args:
        dataset_dir: ADEChallengeData2016 (images/SPLIT, annotations/SPLIT; `colorN.csv` gives other colours than
            ADE20K's), a folder with images/ and conditions/, with or without splits; a folder with JSON lines that name
            both; photos; or `builtin:scenes`. A folder without splits is all "training".
        condition: "labels", "image", or a preprocessor that computes conditions from the images ("canny", "hed", ...);
            "auto": labels if the data set is ADE20K's, has a palette or is painted with ADE20K's, else image.
        captions: JSON lines or a folder of text files; default: those in the folder.
        caption_template: For images without a caption: "a photo of a {scene}".
        cache_dir: For `builtin:scenes` and computed conditions; default: `~/.cache/ether_diffusion`.
        limit: At most so many pairs, the first by name.

    Raises:
        UserError: What is wrong with folder, split, captions or conditions: what was given, what is allowed, where.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}, expected at least 1, or null")
    layout = find_layout(dataset_dir, cache_dir)
    images, conditions = files_of_split(layout, split, condition, captions)
    if is_preprocessor(condition):
        files, kind = [Pair(name, path, None) for name, path in images.items()], condition
    else:
        files = matched(images, conditions)
        kind = kind_of(layout, files, condition)
        lossy = [file.condition for file in files if file.condition and file.condition.suffix.lower() in _LOSSY]
        if kind == "labels" and lossy:
            count = f"{len(lossy):,} label maps as JPEG, which changes labels"
            raise UserError(f"{lossy[0].parent}: {count}: {first_names(path.name for path in lossy)}; expected PNG")
    if not files:
        raise UserError(f"{layout.folder}: no pairs in split {split!r}; expected {LAYOUTS}")
    texts, notes = find_captions(files, layout.folder, split, captions, caption_template)
    pairs = tuple(replace(file, caption=text) for file, text in zip(files, texts, strict=True))[:limit]
    if pairs[0].image is None:
        notes.insert(0, f"{layout.folder}: no images in split {split!r}: conditions to generate from")
    found = Pairs(str(dataset_dir), split, pairs, kind, notes=tuple(notes), cache_dir=cache_dir)
    if kind != "labels":
        return found
    classes = read_classes(layout.folder)
    return replace(found, palette=classes.palette, names=classes.names, ignore_exif=layout.is_ade20k)


def files_of_split(
    layout: Layout, split: str, condition: str, captions: Path | None = None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The images and the conditions of a split by name; where conditions are computed, images alone.

    Raises:
        UserError: No such split or preprocessor; neither a folder of conditions nor JSON lines that name some.
    """
    if is_preprocessor(condition):
        Preprocessor(condition)  # an unknown name stops here
        return layout.of_split(split)[0], {}
    return layout.of_split(split) if layout.conditions else _files_by_lines(layout.folder, split, captions)


def _files_by_lines(folder: Path, split: str, captions: Path | None = None) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and conditions as JSON lines name them, by paths in the data set or next to the lines."""
    lines = captions if captions and not captions.is_dir() else lines_file(folder, split)
    if lines is None:
        raise UserError(f"{folder}: images without conditions; expected {LAYOUTS}")
    if captions is None and split not in ("training", lines.stem):
        raise UserError(f"{folder}: no split {split!r}: no {split}.jsonl next to {lines.name}")
    files: dict[str, tuple[Path, Path]] = {}
    for row in read_rows(lines):
        if not row.image or not row.condition:
            raise UserError(f"{lines}:{row.number}: names no image and condition; expected both, or {LAYOUTS}")
        image, condition = (
            _existing(name, (folder, lines.parent), lines, row.number) for name in (row.image, row.condition)
        )
        stem = same_name(image.stem)
        if stem in files:
            raise UserError(f"{lines}:{row.number}: a second image named {stem}; expected different names")
        files[stem] = image, condition
    images, conditions = ({name: files[name][k] for name in sorted(files)} for k in (0, 1))
    return images, conditions


def _existing(name: str, roots: Sequence[Path], lines: Path, number: int) -> Path:
    for root in roots:
        if (path := find_same(root / name)).exists():
            return check_file(path)
    raise UserError(f"{lines}:{number}: {name}: no such file in {roots[0]}")


def kind_of(layout: Layout, files: Sequence[Pair], condition: str) -> str:
    """The kind of conditions, "labels" or "image": as the user or the folder states it, or by a look at a few files.

    Raises:
        UserError: "image" for ADE20K's label maps, or grey conditions that may be either.
    """
    if condition == "image" and layout.is_ade20k:
        raise UserError(
            f"data.condition=image, but {layout.folder} is ADE20K's; expected auto, labels or a preprocessor"
        )
    if condition != "auto":
        return condition
    tables = (path for pattern in ("color*.csv", "objectInfo*.txt") for path in layout.folder.glob(pattern))
    if layout.is_ade20k or any(tables):
        return "labels"
    return _seen_kind([file.condition for file in files[:8] if file.condition])


def _seen_kind(conditions: list[Path]) -> str:
    """The kind of a folder's conditions by a few of them; the user decides where they do not show it."""
    looks = {_look(path) for path in conditions}
    if looks == {"labels"}:
        raise UserError(
            f"{conditions[0].parent}: grey images with values of at most 150: label maps, or dark images? Give "
            "data.condition=labels (painted with ADE20K's palette, or with color*.csv in the data set's folder) or "
            "data.condition=image"
        )
    return "labels" if looks == {"painted"} else "image"


def _look(path: Path) -> str:
    image = open_raw(path)
    if image.mode in ONE_CHANNEL:
        return "labels" if np.asarray(image).max() < len(ADE20K) else "image"
    pixels = np.asarray(image.convert("RGB"))
    one_colour = (pixels == pixels[0, 0]).all()
    return "image" if one_colour or off_palette(pixels, ADE20K).any() else "painted"


_LOSSY = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}

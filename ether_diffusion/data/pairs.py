"""Pairs of image and condition with a caption: ADE20K's folders, folders of pairs, or photos and a preprocessor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ether_diffusion.data.builtin import builtin_scenes
from ether_diffusion.data.conditions import ONE_CHANNEL, off_palette, open_raw
from ether_diffusion.data.pair_captions import find_captions, lines_file, read_rows
from ether_diffusion.data.pair_files import LAYOUTS, Files, Layout, find_layout, matched, shown
from ether_diffusion.data.palettes import ADE20K, read_classes
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError


@dataclass(frozen=True)
class Pair:
    """One image, its condition and its caption. Without image: a condition to draw from. Without condition: one is
    made of the image."""

    name: str
    image: Path | None
    condition: Path | None
    caption: str


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split, in the order of their names."""

    folder: str
    split: str
    pairs: tuple[Pair, ...]
    kind: str
    """labels: label maps or maps painted with the palette; image: images, taken as they are; or a preprocessor."""
    palette: np.ndarray | None = None
    """(N + 1, 3) uint8, row 0 for what has no label; None unless `kind` is labels."""
    names: tuple[str, ...] = ()
    """Of the labels 1 to N, where the data set tells them."""
    notes: tuple[str, ...] = ()
    """What the user should hear, one line each."""
    as_stored: bool = False
    """The maps were drawn on the pixels as they are stored, whatever the image's EXIF orientation says (ADE20K)."""
    cache_dir: Path | None = None
    """Where conditions that are made of images are kept; None: the user's cache."""

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
    """The pairs of a split. Lists files and reads captions; images and maps are opened when their turn comes.

    Args:
        dataset_dir: ADEChallengeData2016 (images/SPLIT, annotations/SPLIT; `colorN.csv` gives other colours than
            ADE20K's), a folder with images/ and conditions/, with or without splits; a folder with JSON lines that name
            both; photos; or `builtin:scenes`. A folder without splits is all "training".
        condition: "labels", "image", or a preprocessor that makes the conditions of the images ("canny", "hed", ...);
            "auto": labels where the data set is ADE20K's, brings a palette or is painted with ADE20K's, else image.
        captions: JSON lines or a folder of text files; default: what the folder has.
        caption_template: For images without a caption: "a photo of a {scene}".
        cache_dir: For `builtin:scenes` and made conditions; default: `~/.cache/ether_diffusion`.
        limit: So many pairs, the first by name.

    Raises:
        UserError: What is wrong with folder, split, captions or conditions: what was given, what is allowed, where.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}, expected at least 1, or null")
    if str(dataset_dir).startswith("builtin:"):
        folder = builtin_scenes(str(dataset_dir), cache_dir)
    else:
        folder = Path(dataset_dir).expanduser()
    layout = find_layout(folder)
    if condition in ("auto", "labels", "image"):
        files = matched(*layout.of_split(split)) if layout.conditions else files_by_lines(layout, split, captions)
        kind = kind_of(layout, files, condition)
        lossy = [file.condition for file in files if file.condition and file.condition.suffix.lower() in _LOSSY]
        if kind == "labels" and lossy:
            count = f"{len(lossy):,} label maps as JPEG, which changes labels"
            raise UserError(f"{lossy[0].parent}: {count}: {shown(path.name for path in lossy)}; expected PNG")
    else:
        Preprocessor(condition)  # a name that is not known stops here
        images, _ = layout.of_split(split)
        files, kind = [Files(name, path, None) for name, path in images.items()], condition
    if not files:
        raise UserError(f"{layout.folder}: no pairs in split {split!r}; expected {LAYOUTS}")
    texts, notes = find_captions(files, layout.folder, split, captions, caption_template)
    pairs = tuple(Pair(*file, caption=text) for file, text in zip(files, texts, strict=True))[:limit]
    if pairs[0].image is None:
        notes.insert(0, f"{layout.folder}: no images in split {split!r}: conditions to draw from")
    found = Pairs(str(dataset_dir), split, pairs, kind, notes=tuple(notes), cache_dir=cache_dir)
    if kind != "labels":
        return found
    classes = read_classes(layout.folder)
    return replace(found, palette=classes.palette, names=classes.names, as_stored=layout.is_ade20k)


def files_by_lines(layout: Layout, split: str, captions: Path | None = None) -> list[Files]:
    """Pairs as JSON lines name them, by paths in the data set or beside the lines, where no folder has conditions.

    Raises:
        UserError: No such lines, lines that name no image and condition, files that do not exist.
    """
    folder = layout.folder
    lines = captions if captions and captions.is_file() else lines_file(folder, split)
    if lines is None:
        raise UserError(f"{folder}: images without conditions; expected {LAYOUTS}")
    if captions is None and split not in ("training", lines.stem):
        raise UserError(f"{folder}: no split {split!r}: no {split}.jsonl beside {lines.name}")
    files: dict[str, Files] = {}
    for row in read_rows(lines):
        if not row.image or not row.condition:
            raise UserError(f"{lines}:{row.number}: names no image and condition; expected both, or {LAYOUTS}")
        roots = folder, lines.parent
        image = _existing(row.image, roots, lines, row.number)
        condition = _existing(row.condition, roots, lines, row.number)
        if image.stem in files:
            raise UserError(f"{lines}:{row.number}: a second image named {image.stem}; expected names of their own")
        files[image.stem] = Files(image.stem, image, condition)
    return [files[name] for name in sorted(files)]


def _existing(name: str, roots: Sequence[Path], lines: Path, number: int) -> Path:
    for root in roots:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{lines}:{number}: {name}: no such file in {roots[0]}")


def kind_of(layout: Layout, files: Sequence[Files], condition: str) -> str:
    """What the conditions are, "labels" or "image": told by the user or the folder, or seen in a few files.

    Raises:
        UserError: "image" for ADE20K's label maps, or grey conditions that may be either.
    """
    if condition == "image" and layout.is_ade20k:
        raise UserError(f"condition: image, but {layout.folder} is ADE20K's; expected auto, labels or a preprocessor")
    kind = condition
    if condition == "auto":
        told = layout.is_ade20k or any(layout.folder.glob("color*.csv")) or any(layout.folder.glob("objectInfo*.txt"))
        kind = "labels" if told else _seen_kind([file.condition for file in files[:8] if file.condition])
    return kind


def _seen_kind(conditions: list[Path]) -> str:
    """What a folder of conditions holds, by a few of them; the user decides where that cannot be seen."""
    looks = {_look(path) for path in conditions}
    if looks == {"labels"}:
        raise UserError(
            f"{conditions[0].parent}: grey images with values up to 150 at most: label maps, or dark images? Say "
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

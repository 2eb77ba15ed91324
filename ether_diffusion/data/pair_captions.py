"""Captions of pairs: JSON lines, text files next to the images or in a folder, or a template."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ether_diffusion.data.captions import EMPTY, CaptionFault, Captions, text_captions
from ether_diffusion.data.pair_files import Pair, first_names
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.input_files import read_text, same_name

IMAGE_KEYS = ("image", "target", "file_name")
CONDITION_KEYS = ("condition", "source", "conditioning_image")
CAPTION_KEYS = ("prompt", "caption", "text")
OFFICIAL_VALIDATION = 2000
"""Images in ADE20K's validation split."""

SCENES = "sceneCategories.txt"
"""ADE20K's list of images and their scenes, for `{scene}` in a template."""


class Row(NamedTuple):
    """A line of a captions file: its number, the files that it names, and the caption, which may be empty."""

    number: int
    image: str | None
    condition: str | None
    caption: str


@dataclass
class PairCaptions(Captions):
    """Captions by the names of pairs."""

    rows: list[Row] = field(default_factory=list)
    """The lines that can be read, where the source is JSON lines."""
    unused_rows: list[Row] = field(default_factory=list)
    """Those of them that name no pair."""


def find_captions(
    files: Sequence[Pair], folder: Path, split: str, source: Path | None = None, template: str | None = None
) -> tuple[list[str], list[str]]:
    """A caption for each pair, in their order, and notes for the user. The template fills in where one is missing.

    Args:
        source: JSON lines, or a folder of text files; default: JSON lines in the data set's folder, else text files
            next to the images.
        template: May hold `{name}`, the pair's name, and `{scene}`, its scene by ADE20K's `sceneCategories.txt`.

    Raises:
        UserError: No captions, some missing without a template, rows that match nothing, empty or ambiguous captions.
    """
    source = captions_source(folder, split, source)
    found = collect_captions(files, folder, split, source)
    found.raise_faults()
    rows, unused = found.rows, len(found.unused_rows)
    if rows and unused == len(rows):
        raise UserError(
            f"{source}: none of its {len(rows):,} rows names one of the {len(files):,} pairs of {folder}, split "
            f"{split}: the first row names {rows[0].image or rows[0].condition}, the first pair is {files[0].name}"
            f"{_numbered_hint(rows)}"
        )
    if source is not None and unused:
        found.notes.append(f"Captions: {unused:,} of {len(rows):,} rows in {source.name} name no image of this split")
    by_name, notes = found.by_name, found.notes
    if template is not None:
        _check_template(template)
    missing = [file.name for file in files if file.name not in by_name]
    if missing and template is None:
        if not by_name and source is None:
            wanted = f"captions/{split}.jsonl in {folder}, text files next to the images (NAME.txt), data.captions=FILE"
            raise UserError(f"{folder}: no captions; expected {wanted}, or data.caption_template='a photo'")
        count = f"{len(missing):,} of {len(files):,} images have no caption"
        raise UserError(f"{source or folder}: {count}: {first_names(missing)}; add them, or give data.caption_template")
    if missing:
        assert template is not None
        by_name |= from_template(missing, folder, template)
        if len(missing) < len(files):
            notes.append(f"Captions: the template fills in for {len(missing):,} of {len(files):,} images")
    return [by_name[file.name] for file in files], notes


def from_template(names: Sequence[str], folder: Path, template: str) -> dict[str, str]:
    """The template, filled in for each name.

    Raises:
        UserError: An unknown placeholder, or a scene that the data set does not state.
    """
    wanted = _check_template(template)
    scenes = _scenes(folder) if "scene" in wanted else {}
    if "scene" in wanted and (without := [name for name in names if name not in scenes]):
        raise UserError(f"{folder / SCENES}: no scene for {len(without):,} images: {first_names(without)}")
    return {name: template.format(name=name, scene=scenes.get(name, "")) for name in names}


def _check_template(template: str) -> set[str]:
    """The placeholders of a template. Raises UserError for unknown ones."""
    known = ("name", "scene")
    try:
        wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        template.format(name="", scene="")
    except KeyError as error:
        other = str(error).strip("'")
        raise UserError(
            f"data.caption_template: {template!r}: unknown {{{other}}}; known: {{name}}, {{scene}}."
            f"{did_you_mean(other, known)}"
        ) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"data.caption_template: {template!r}: {error}") from None
    if not template.strip():
        raise UserError("data.caption_template: empty; expected words")
    return wanted


def _scenes(folder: Path) -> dict[str, str]:
    file = folder / SCENES
    if not file.is_file():
        raise UserError(f"{file}: no such file; {{scene}} in data.caption_template needs it")
    rows = (line.split() for line in read_text(file).splitlines())
    return {row[0]: row[1].replace("_", " ") for row in rows if len(row) == 2}


def own_captions(files: Sequence[Pair], folder: Path, split: str) -> dict[str, str]:
    """The captions that a data set has already, by name: of all images, of some, or of none.

    Raises:
        UserError: Captions that cannot be read. Empty ones count as missing.
    """
    found = collect_captions(files, folder, split, captions_source(folder, split))
    found.raise_faults(ignored=EMPTY)
    return found.by_name


def collect_captions(files: Sequence[Pair], folder: Path, split: str, source: Path | None) -> PairCaptions:
    """The captions of these pairs in one source (see `captions_source`), and every fault of it.

    Rows name files by their paths in the data set or next to the source, or by name alone.
    """
    if source is not None and not source.is_dir():
        return _from_lines(files, folder, split, source)
    folders = [source] if source else list(dict.fromkeys(file.image.parent for file in files if file.image))
    return PairCaptions(**vars(text_captions((file.name for file in files), folders)))


def captions_source(folder: Path, split: str, given: Path | None = None) -> Path | None:
    """The given file or folder of captions, else the JSON lines in a data set's folder; None: texts next to the images.

    Raises:
        UserError: What is given does not exist.
    """
    if given is None:
        return lines_file(folder, split)
    if not given.expanduser().exists():
        raise UserError(f"captions: {given.expanduser()}: no such file or folder")
    return given.expanduser()


def lines_file(folder: Path, split: str) -> Path | None:
    """The JSON lines in a data set's folder, under one of their usual names."""
    for name in (f"captions/{split}.jsonl", f"{split}.jsonl", "captions.jsonl", "metadata.jsonl", "prompt.json"):
        if (folder / name).exists():
            return folder / name
    return None


def captions_of_split(split: str, trained_on: str, captions: Path | None, own: Path | None = None) -> Path | None:
    """The source of a split's captions according to a run's settings; None: the data set itself.

    Args:
        trained_on: The split that `captions` was given for. A file of captions is one split's; a folder may be all's.
        own: The source that was given for this split itself, where it is not the one trained on.
    """
    if split == trained_on:
        return captions
    return own or (captions if captions is not None and captions.expanduser().is_dir() else None)


def read_rows(file: Path) -> list[Row]:
    """The rows of JSON lines. Keys: image, target or file_name; condition, source or conditioning_image; prompt,
    caption or text. Others are ignored.

    Raises:
        UserError: Lines that are no JSON objects or lack the keys (the first few are named), or no lines.
    """
    found = _parse(file)
    found.raise_faults()
    return found.rows


def match_rows(
    rows: Sequence[Row], files: Sequence[Pair], split: str, roots: Sequence[Path]
) -> tuple[list[tuple[Row, str]], list[str]]:
    """Rows with the names of their pairs, without those that match none; and notes for the user.

    Rows match by path where the path exists, so that files of one name in two splits stay apart; else by the file's
    name. The captions of ADE20K's validation split that OFT's authors published, and only those, match by number.
    """
    by_path = {same_name(str(path)): file.name for file in files for path in (file.image, file.condition) if path}
    names = {file.name for file in files}
    pairs = []
    for row in rows:
        for named in filter(None, (row.image, row.condition)):
            paths = [root / named for root in roots]
            keys = (same_name(str(path)) for path in paths)
            name = next((by_path[key] for key in keys if key in by_path), None)
            stem = same_name(Path(named).stem)
            if name is None and stem in names and not any(path.exists() for path in paths):
                name = stem
            if name is not None:
                pairs.append((row, name))
                break
    if pairs or not (numbered := _numbered_validation(rows, files, split)):
        return pairs, []
    note = "Captions: rows are numbered and name no image; row i is matched with ADE_val_(i + 1), an order that their"
    return numbered, [f"{note} publisher does not state"]


def _from_lines(files: Sequence[Pair], folder: Path, split: str, source: Path) -> PairCaptions:
    found = _parse(source)
    matches, found.notes = match_rows(found.rows, files, split, (folder, source.parent))
    for row, name in matches:
        if not row.caption:
            found.faults.append(CaptionFault(EMPTY, source, "an empty caption", row.number))
        elif name in found.by_name:
            detail = f"a second caption for {name}; expected one per pair"
            found.faults.append(CaptionFault("second captions for one image", source, detail, row.number))
        else:
            found.by_name[name] = row.caption
    matched = {row.number for row, _ in matches}
    found.unused_rows = [row for row in found.rows if row.number not in matched]
    return found


def _parse(file: Path) -> PairCaptions:
    """The rows of JSON lines, and the faults of lines that are neither rows nor blank."""
    found, kind = PairCaptions(), "lines of captions that cannot be used"
    try:
        lines = read_text(file).split("\n")  # JSON's texts may hold other line breaks
    except UserError as error:
        found.faults = [CaptionFault(kind, file, str(error).removeprefix(f"{file}: "))]
        return found
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.rows.append(_row(line, number))
        except ValueError as error:
            found.faults.append(CaptionFault(kind, file, str(error), number))
    if not found.rows and not found.faults:
        found.faults = [CaptionFault(kind, file, "no lines")]
    return found


def _row(line: str, number: int) -> Row:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {', '.join(CAPTION_KEYS)}, got {row!r:.60}")
    image, condition, caption = (
        next((row[key] for key in keys if row.get(key) is not None), None)
        for keys in (IMAGE_KEYS, CONDITION_KEYS, CAPTION_KEYS)
    )
    if (image is None and condition is None) or caption is None:
        needed = f"one of {', '.join(IMAGE_KEYS + CONDITION_KEYS)} and one of {', '.join(CAPTION_KEYS)}"
        raise ValueError(f"has {', '.join(map(str, row)) or 'nothing'}; expected {needed}")
    for value in (image, condition, caption):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"expected texts, got {value!r:.60}")
    return Row(number, image, condition, " ".join(caption.split()))


def _numbered_validation(rows: Sequence[Row], files: Sequence[Pair], split: str) -> list[tuple[Row, str]]:
    """OFT's captions of ADE20K name 0.png to 1999.png; only in the validation split does their number fit."""
    if split != "validation" or len(rows) != OFFICIAL_VALIDATION or not _are_numbered(rows):
        return []
    official = [re.fullmatch(r"ADE_val_(\d{8})", file.name) for file in files]
    if not all(match and 1 <= int(match[1]) <= len(rows) for match in official):
        return []
    names = {file.name for file in files}
    return [(row, name) for i, row in enumerate(rows) if (name := f"ADE_val_{i + 1:08d}") in names]


def _are_numbered(rows: Sequence[Row]) -> bool:
    return all(Path(row.image or row.condition or "").stem == str(i) for i, row in enumerate(rows))


def _numbered_hint(rows: Sequence[Row]) -> str:
    if not _are_numbered(rows):
        return ""
    return ". Rows that are only numbered do not identify their images; `ether-diffusion data caption` writes captions"

"""Captions of pairs: JSON lines, text files next to the images or in a folder, or a template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ether_diffusion.data.caption_template import from_template
from ether_diffusion.data.captions import caption_in, list_texts
from ether_diffusion.data.pair_files import Pair, first_names
from ether_diffusion.errors import UserError

IMAGE_KEYS = ("image", "target", "file_name")
CONDITION_KEYS = ("condition", "source", "conditioning_image")
CAPTION_KEYS = ("prompt", "caption", "text")
OFFICIAL_VALIDATION = 2000
"""Images in ADE20K's validation split."""

EMPTY = "empty captions"


class Row(NamedTuple):
    """A line of a captions file: its number, the files that it names, and the caption, which may be empty."""

    number: int
    image: str | None
    condition: str | None
    caption: str


class CaptionFault(NamedTuple):
    """What is wrong with one caption: the kind as a plural, for counts (`3 KIND`); its file and line; the details."""

    kind: str
    file: Path
    detail: str
    line: int | None = None

    def message(self, file: str) -> str:
        """`FILE:3: an empty caption`."""
        return f"{file}:{self.line}: {self.detail}" if self.line else f"{file}: {self.detail}"


@dataclass
class Collected:
    """The captions of pairs in one source, by name, with everything that is wrong with the source."""

    by_name: dict[str, str] = field(default_factory=dict)
    faults: list[CaptionFault] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """The lines that can be read, where the source is JSON lines."""
    unused_rows: list[Row] = field(default_factory=list)
    """Those of them that name no pair."""
    unused_texts: list[Path] = field(default_factory=list)
    """Text files that belong to no pair."""
    notes: list[str] = field(default_factory=list)


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
    _raise_first(found.faults)
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


def own_captions(files: Sequence[Pair], folder: Path, split: str) -> dict[str, str]:
    """The captions that a data set has already, by name: of all images, of some, or of none.

    Raises:
        UserError: Captions that cannot be read. Empty ones count as missing.
    """
    found = collect_captions(files, folder, split, captions_source(folder, split))
    _raise_first([fault for fault in found.faults if fault.kind != EMPTY])
    return found.by_name


def collect_captions(files: Sequence[Pair], folder: Path, split: str, source: Path | None) -> Collected:
    """The captions of these pairs in one source (see `captions_source`), and every fault of it.

    Rows name files by their paths in the data set or next to the source, or by name alone.
    """
    if source is not None and source.is_file():
        return _from_lines(files, folder, split, source)
    folders = [source] if source else dict.fromkeys(file.image.parent for file in files if file.image)
    return _from_texts({file.name for file in files}, folders)


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
        if (folder / name).is_file():
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
    rows, faults = _parse(file)
    _raise_first(faults)
    return rows


def match_rows(
    rows: Sequence[Row], files: Sequence[Pair], split: str, roots: Sequence[Path]
) -> tuple[list[tuple[Row, str]], list[str]]:
    """Rows with the names of their pairs, without those that match none; and notes for the user.

    Rows match by path where the path exists, so that files of one name in two splits stay apart; else by the file's
    name. The captions of ADE20K's validation split that OFT's authors published, and only those, match by number.
    """
    by_path = {path: file.name for file in files for path in (file.image, file.condition) if path}
    names = {file.name for file in files}
    pairs = []
    for row in rows:
        for named in filter(None, (row.image, row.condition)):
            paths = [root / named for root in roots]
            name = next((by_path[path] for path in paths if path in by_path), None)
            stem = Path(named).stem
            if name is None and stem in names and not any(path.exists() for path in paths):
                name = stem
            if name is not None:
                pairs.append((row, name))
                break
    if pairs or not (numbered := _numbered_validation(rows, files, split)):
        return pairs, []
    note = "Captions: rows are numbered and name no image; row i is matched with ADE_val_(i + 1), an order that their"
    return numbered, [f"{note} publisher does not state"]


def _from_lines(files: Sequence[Pair], folder: Path, split: str, source: Path) -> Collected:
    found = Collected()
    found.rows, found.faults = _parse(source)
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


def _from_texts(names: set[str], folders: Iterable[Path]) -> Collected:
    found = Collected()
    for name, path in (item for folder in folders for item in list_texts(folder).items()):
        if name not in names:
            found.unused_texts.append(path)
            continue
        caption, fault = caption_in(path)
        if fault:
            kind = "unreadable captions" if caption is None else EMPTY
            found.faults.append(CaptionFault(kind, path, fault))
        else:
            found.by_name[name] = caption or ""
    return found


def _raise_first(faults: Sequence[CaptionFault], most: int = 5) -> None:
    if faults:
        more = [f"{faults[0].file}: {len(faults) - most:,} more faults"] * (len(faults) > most)
        raise UserError("\n".join([fault.message(str(fault.file)) for fault in faults[:most]] + more))


def _parse(file: Path) -> tuple[list[Row], list[CaptionFault]]:
    """The rows of JSON lines, and the faults of lines that are neither rows nor blank."""
    rows, faults, kind = [], [], "lines of captions that cannot be used"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON's texts may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        detail = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
        return [], [CaptionFault(kind, file, detail)]
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(_row(line, number))
        except ValueError as error:
            faults.append(CaptionFault(kind, file, str(error), number))
    return rows, faults if rows or faults else [CaptionFault(kind, file, "no lines")]


def _row(line: str, number: int) -> Row:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
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

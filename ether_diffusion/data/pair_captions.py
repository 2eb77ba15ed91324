"""Captions of pairs: JSON lines, text files beside the images or in a folder, or a template."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ether_diffusion.data.captions import read_caption
from ether_diffusion.data.pair_files import Files, shown
from ether_diffusion.errors import UserError, did_you_mean

IMAGE_KEYS = ("image", "target", "file_name")
CONDITION_KEYS = ("condition", "source", "conditioning_image")
CAPTION_KEYS = ("prompt", "caption", "text")
SCENES = "sceneCategories.txt"
"""ADE20K's list of images and their scenes, which a template takes `{scene}` from."""

OFFICIAL_VALIDATION = 2000
"""Images in ADE20K's validation split."""


class Row(NamedTuple):
    """A line of a captions file: its number, the files that it names, and the caption, which may be empty."""

    number: int
    image: str | None
    condition: str | None
    caption: str


class Captions(NamedTuple):
    """A caption for each pair, in their order, and what the user should hear."""

    texts: list[str]
    notes: list[str]


def find_captions(
    files: Sequence[Files], folder: Path, split: str, source: Path | None = None, template: str | None = None
) -> Captions:
    """The captions of these pairs. The template stands in where a caption is missing.

    Args:
        source: JSON lines, or a folder of text files; default: JSON lines in the data set's folder, else text files
            beside the images.
        template: May hold `{name}`, the pair's name, and `{scene}`, its scene by ADE20K's `sceneCategories.txt`.

    Raises:
        UserError: No captions, some missing without a template, rows that match nothing, empty or ambiguous captions.
    """
    source = source if source is not None else lines_file(folder, split)
    by_name, notes = {}, []
    if source is not None:
        source = source.expanduser()
        if not source.exists():
            raise UserError(f"captions: {source}: no such file or folder")
    if source is not None and source.is_file():
        by_name, notes = from_lines(files, folder, split, source)
    else:
        names = {file.name for file in files}
        for texts in [source] if source else dict.fromkeys(file.image.parent for file in files if file.image):
            by_name |= {name: read_caption(path) for name, path in texts_in(texts).items() if name in names}
    missing = [file.name for file in files if file.name not in by_name]
    if missing and template is None:
        if not by_name and source is None:
            wanted = f"captions/{split}.jsonl in {folder}, text files beside the images (NAME.txt), data.captions=FILE"
            raise UserError(f"{folder}: no captions; expected {wanted}, or data.caption_template='a photo'")
        where = source or folder
        count = f"{len(missing):,} of {len(files):,} images have no caption"
        raise UserError(f"{where}: {count}: {shown(missing)}; add them, or give data.caption_template")
    if missing:
        assert template is not None
        by_name |= from_template(missing, folder, template)
        if len(missing) < len(files):
            notes.append(f"Captions: the template stands in for {len(missing):,} of {len(files):,} images")
    return Captions([by_name[file.name] for file in files], notes)


def own_captions(files: Sequence[Files], folder: Path, split: str) -> dict[str, str]:
    """The captions that a data set has already, by name; of some images, or of none.

    Raises:
        UserError: The data set's JSON lines cannot be read.
    """
    source = lines_file(folder, split)
    if source is not None:
        matched, _ = match_rows(read_rows(source), files, split, (folder, source.parent))
        return {name: row.caption for row, name in matched if row.caption}
    names, found = {file.name for file in files}, {}
    for texts in dict.fromkeys(file.image.parent for file in files if file.image):
        found |= {name: read_caption(path) for name, path in texts_in(texts).items() if name in names}
    return found


def lines_file(folder: Path, split: str) -> Path | None:
    """The JSON lines in a data set's folder, by the names that are known."""
    for name in (f"captions/{split}.jsonl", f"{split}.jsonl", "captions.jsonl", "metadata.jsonl", "prompt.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def captions_of_split(split: str, trained_on: str, captions: Path | None, own: Path | None = None) -> Path | None:
    """Where the captions of a split lie by a run's settings; None: in the data set.

    Args:
        trained_on: The split that `captions` was given for. A file of captions is one split's; a folder may be all's.
        own: What was given for this split itself, where it is another.
    """
    if split == trained_on:
        return captions
    return own or (captions if captions is not None and captions.expanduser().is_dir() else None)


def read_rows(file: Path) -> list[Row]:
    """The rows of JSON lines. Keys: image, target or file_name; condition, source or conditioning_image; prompt,
    caption or text. Others are passed over.

    Raises:
        UserError: Lines that are no JSON objects or lack the keys (the first few are named), or no lines.
    """
    rows, faults = [], []
    for row in parsed(file):
        if isinstance(row, UserError):
            faults.append(str(row))
        else:
            rows.append(row)
    if faults:
        raise UserError("\n".join(faults[:5] + [f"{file}: {len(faults) - 5:,} faulty lines more"] * (len(faults) > 5)))
    if not rows:
        raise UserError(f"{file}: no lines")
    return rows


def parsed(file: Path) -> Iterator[Row | UserError]:
    """Each line that is not blank, as a row or as what is wrong with it. Raises UserError for what is no text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON's texts may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{file}: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _row(json.loads(line), file, number)
        except json.JSONDecodeError as error:
            yield UserError(f"{file}:{number}: not a line of JSON: {error}")
        except UserError as error:
            yield error


def from_lines(files: Sequence[Files], folder: Path, split: str, source: Path) -> tuple[dict[str, str], list[str]]:
    """Captions by pair: rows name files by their paths in the data set or beside the source, or by name alone.

    Raises:
        UserError: Rows that match nothing, an empty caption, or two for a pair.
    """
    rows = read_rows(source)
    pairs, notes = match_rows(rows, files, split, (folder, source.parent))
    if not pairs:
        named = rows[0].image or rows[0].condition
        raise UserError(
            f"{source}: none of its {len(rows):,} rows names one of the {len(files):,} pairs of {folder}, split "
            f"{split}: the first row names {named}, the first pair is {files[0].name}{_why_numbered(rows)}"
        )
    by_name: dict[str, str] = {}
    for row, name in pairs:
        if not row.caption:
            raise UserError(f"{source}:{row.number}: an empty caption")
        if name in by_name:
            raise UserError(f"{source}:{row.number}: a second caption for {name}; expected one a pair")
        by_name[name] = row.caption
    unused = len(rows) - len(pairs)
    if unused:
        notes.append(f"Captions: {unused:,} of {len(rows):,} rows in {source.name} name no image of this split")
    return by_name, notes


def match_rows(
    rows: Sequence[Row], files: Sequence[Files], split: str, roots: Sequence[Path]
) -> tuple[list[tuple[Row, str]], list[str]]:
    """Rows with the names of their pairs, without those that match none; and what the user should hear of it.

    By path where the path exists, so that files of one name in two splits stay apart; else by the file's name. The
    captions of ADE20K's validation split that OFT's authors published, and those alone, by their number.
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
    note = (
        "Captions: rows are numbered and name no image; row i is taken for ADE_val_(i + 1), which its publisher does "
    )
    return numbered, [note + "not state"]


def texts_in(folder: Path) -> dict[str, Path]:
    """The text files of a folder by the names of the pairs that they would belong to."""
    texts = (entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() == ".txt")
    return {entry.stem: entry for entry in texts if not entry.name.startswith(".")}


def from_template(names: Sequence[str], folder: Path, template: str) -> dict[str, str]:
    """The template, filled in for each name.

    Raises:
        UserError: An unknown placeholder, or a scene that the data set does not tell.
    """
    known = ("name", "scene")
    try:
        wanted = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(f"data.caption_template: {template!r}: {error}") from None
    for field in wanted - set(known):
        raise UserError(
            f"data.caption_template: {template!r}: unknown {{{field}}}; known: {{name}}, {{scene}}."
            f"{did_you_mean(field, known)}"
        )
    if not template.strip():
        raise UserError("data.caption_template: empty; expected words")
    scenes = _scenes(folder) if "scene" in wanted else {}
    if "scene" in wanted and not all(name in scenes for name in names):
        without = [name for name in names if name not in scenes]
        raise UserError(f"{folder / SCENES}: no scene for {len(without):,} images: {shown(without)}")
    return {name: template.format(name=name, scene=scenes.get(name, "")) for name in names}


def _row(row: Any, file: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{file}:{number}: expected an object with {', '.join(CAPTION_KEYS)}, got {row!r:.60}")
    image, condition, caption = (
        next((row[key] for key in keys if row.get(key) is not None), None)
        for keys in (IMAGE_KEYS, CONDITION_KEYS, CAPTION_KEYS)
    )
    if (image is None and condition is None) or caption is None:
        needed = f"one of {', '.join(IMAGE_KEYS + CONDITION_KEYS)} and one of {', '.join(CAPTION_KEYS)}"
        raise UserError(f"{file}:{number}: has {', '.join(map(str, row)) or 'nothing'}; expected {needed}")
    for value in (image, condition, caption):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{file}:{number}: expected texts, got {value!r:.60}")
    return Row(number, image, condition, " ".join(caption.split()))


def _numbered_validation(rows: Sequence[Row], files: Sequence[Files], split: str) -> list[tuple[Row, str]]:
    """OFT's captions of ADE20K name 0.png to 1999.png; for the validation split alone their number fits."""
    if split != "validation" or len(rows) != OFFICIAL_VALIDATION or not _are_numbered(rows):
        return []
    official = [re.fullmatch(r"ADE_val_(\d{8})", file.name) for file in files]
    if not all(match and 1 <= int(match[1]) <= len(rows) for match in official):
        return []
    names = {file.name for file in files}
    return [(row, name) for i, row in enumerate(rows) if (name := f"ADE_val_{i + 1:08d}") in names]


def _are_numbered(rows: Sequence[Row]) -> bool:
    return all(Path(row.image or row.condition or "").stem == str(i) for i, row in enumerate(rows))


def _why_numbered(rows: Sequence[Row]) -> str:
    if not _are_numbered(rows):
        return ""
    return ". Rows that are only numbered do not tell their images; `ether-diffusion data caption` writes captions"


def _scenes(folder: Path) -> dict[str, str]:
    file = folder / SCENES
    if not file.is_file():
        raise UserError(f"{file}: no such file, which {{scene}} in data.caption_template is taken from")
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1].replace("_", " ") for row in rows if len(row) == 2}

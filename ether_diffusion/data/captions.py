"""Captions in text files: `photo.txt` belongs to `photo.jpg`, and replaces the instance prompt for that photo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ether_diffusion.data.photos import PhotoFolder
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.input_files import list_folder, read_text, same_name

EMPTY = "empty captions"


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
class Captions:
    """Captions by name, with everything that is wrong with their source."""

    by_name: dict[str, str] = field(default_factory=dict)
    faults: list[CaptionFault] = field(default_factory=list)
    unused_texts: list[Path] = field(default_factory=list)
    """Text files that belong to no name."""
    notes: list[str] = field(default_factory=list)

    def raise_faults(self, ignored: str = "", most: int = 5) -> None:
        """Raise UserError with the first few faults that are not of the ignored kind."""
        faults = [fault for fault in self.faults if fault.kind != ignored]
        if faults:
            more = [f"{faults[0].file}: {len(faults) - most:,} more faults"] * (len(faults) > most)
            raise UserError("\n".join([fault.message(str(fault.file)) for fault in faults[:most]] + more))


def photo_captions(photos: PhotoFolder) -> Captions:
    """The captions in a folder of photos, by the photos' names.

    Raises:
        UserError: Empty or unreadable captions, or none at all.
    """
    path = Path(photos.folder).expanduser()
    if not path.is_dir():
        raise UserError(f"captions: {photos.folder} is not a folder; expected one with text files next to its photos")
    stems = {photo.name: same_name(Path(photo.name).stem) for photo in photos.photos}
    found = text_captions(stems.values(), [path])
    found.raise_faults()
    missing = {name: stem for name, stem in stems.items() if stem not in found.by_name}
    if not found.by_name:
        wanted = Path(photos.photos[0].name).with_suffix(".txt").name
        raise UserError(f"captions: no photo in {photos.folder} has one; expected text files such as {wanted}")
    note = f"Captions: {len(stems) - len(missing)} of {len(stems)} photos have one"
    found.notes = [note + (f"; the instance prompt is used for {', '.join(missing)}" if missing else "")]
    for file in found.unused_texts:
        found.notes.append(f"Captions: no photo matches {file.name}.{did_you_mean(file.stem, missing.values())}")
    found.by_name = {name: found.by_name[stem] for name, stem in stems.items() if stem in found.by_name}
    return found


def text_captions(names: Iterable[str], folders: Sequence[Path]) -> Captions:
    """The captions in the folders' text files, by their stems: UTF-8; several lines are joined by spaces."""
    found, names = Captions(), set(names)
    for path in (path for folder in folders for path in list_texts(folder)):
        name = same_name(path.stem)
        if name not in names:
            found.unused_texts.append(path)
            continue
        try:
            caption = " ".join(read_text(path).split())
        except UserError as error:
            detail = str(error).removeprefix(f"{path}: ")
            found.faults.append(CaptionFault("unreadable captions", path, detail))
            continue
        if caption:
            found.by_name[name] = caption
        else:
            found.faults.append(CaptionFault(EMPTY, path, "an empty caption; write one, or delete the file"))
    return found


def list_texts(folder: Path) -> list[Path]:
    """The text files of a folder, in the order of their names."""
    return [entry for entry in list_folder(folder) if entry.suffix.lower() == ".txt"]

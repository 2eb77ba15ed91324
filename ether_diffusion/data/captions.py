"""Captions: a text file `photo.txt` next to `photo.jpg` replaces the instance prompt for that photo."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ether_diffusion.data.photos import PhotoFolder
from ether_diffusion.errors import UserError, did_you_mean


class Captions(NamedTuple):
    """Captions by the names of their photos, the names of their files, and notes for the user, one line each."""

    by_photo: dict[str, str]
    files: list[str]
    notes: list[str]


def read_captions(photos: PhotoFolder) -> Captions:
    """The captions in a folder of photos: UTF-8; several lines are joined by spaces.

    Raises:
        UserError: Empty or unreadable captions (all are named), or none at all.
    """
    path = Path(photos.folder).expanduser()
    if not path.is_dir():
        raise UserError(f"captions: {photos.folder} is not a folder; expected one with text files next to its photos")
    texts = list_texts(path)
    by_photo, faults = {}, []
    for photo in photos.photos:
        if file := texts.get(Path(photo.name).stem):
            caption, fault = caption_in(file)
            by_photo[photo.name] = caption or ""
            faults += [f"{file}: {fault}"] * bool(fault)
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    if not by_photo:
        wanted = Path(photos.photos[0].name).with_suffix(".txt").name
        raise UserError(f"captions: no photo in {photos.folder} has one; expected text files such as {wanted}")
    notes = [f"Captions: {len(by_photo)} of {len(photos.photos)} photos have one"]
    missing = [photo.name for photo in photos.photos if photo.name not in by_photo]
    if missing:
        notes[0] += f"; the instance prompt is used for {', '.join(missing)}"
    stems, without = {Path(name).stem for name in by_photo}, [Path(name).stem for name in missing]
    for stem, file in texts.items():
        if stem not in stems:
            notes.append(f"Captions: no photo matches {file.name}.{did_you_mean(stem, without)}")
    return Captions(by_photo, [file.name for file in texts.values()], notes)


def list_texts(folder: Path) -> dict[str, Path]:
    """The text files of a folder by stem, in the order of their names."""
    texts = (entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() == ".txt" and entry.is_file())
    return {entry.stem: entry for entry in texts if not entry.name.startswith(".")}


def caption_in(file: Path) -> tuple[str | None, str | None]:
    """The caption in a text file, several lines joined, or None if it is unreadable; and its fault, if it has one."""
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        return None, "not UTF-8 text"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    return text, None if text else "an empty caption; write one, or delete the file"

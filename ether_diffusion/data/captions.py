"""Captions: a text file `photo.txt` beside `photo.jpg` replaces the instance prompt for that photo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.data.photos import PhotoFolder
from ether_diffusion.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Captions:
    """Captions by the names of their photos, the photos without one, and text files without a photo."""

    by_photo: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    files: tuple[str, ...]
    """The names of the files that were read."""

    def notes(self) -> list[str]:
        """What the user should hear, one line each."""
        total = len(self.by_photo) + len(self.missing)
        lines = [f"Captions: {len(self.by_photo)} of {total} photos have one"]
        if self.missing:
            lines[0] += f"; the instance prompt stands in for {', '.join(self.missing)}"
        stems = [Path(name).stem for name in self.missing]
        lines += [
            f"Captions: {name} belongs to no photo.{did_you_mean(Path(name).stem, stems)}" for name in self.unused
        ]
        return lines


def read_captions(photos: PhotoFolder) -> Captions:
    """The captions in a folder of photos: UTF-8; several lines are joined by spaces.

    Raises:
        UserError: empty or unreadable captions (all are named), or none at all.
    """
    path = Path(photos.folder).expanduser()
    if not path.is_dir():
        raise UserError(f"captions: {photos.folder} is no folder, so that no text files lie beside its photos")
    texts = {
        entry.stem: entry
        for entry in sorted(path.iterdir())
        if entry.suffix.lower() == ".txt" and entry.is_file() and not entry.name.startswith(".")
    }
    by_photo, missing, faults, used = {}, [], [], {}
    for photo in photos.photos:
        file = texts.get(Path(photo.name).stem)
        if file is None:
            missing.append(photo.name)
            continue
        used[file.name] = None
        try:
            by_photo[photo.name] = read_caption(file)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    if not by_photo:
        wanted = Path(photos.photos[0].name).with_suffix(".txt").name
        raise UserError(f"captions: no photo in {photos.folder} has one; expected text files such as {wanted}")
    unused = tuple(file.name for file in texts.values() if file.name not in used)
    return Captions(by_photo, tuple(missing), unused, tuple(used))


def read_caption(file: Path) -> str:
    """The caption in a text file; several lines are joined. Raises UserError where it is empty or unreadable."""
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not text:
        raise UserError(f"{file}: an empty caption; write one, or delete the file")
    return text

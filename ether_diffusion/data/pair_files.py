"""Where a data set keeps images and their conditions, and which belong together: by the names of their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ether_diffusion.data.photos import PHOTO_SUFFIXES
from ether_diffusion.errors import UserError, did_you_mean

IMAGES = ("images", "target")
CONDITIONS = ("conditions", "conditioning_images", "source")
ANNOTATIONS = "annotations"
"""ADE20K's name: what lies there are label maps."""

LAYOUTS = (
    "images/ and annotations/ (ADEChallengeData2016), images/ and conditions/, "
    "JSON lines that name image and condition, or photos with data.condition=canny"
)


class Files(NamedTuple):
    """A pair's name, image and condition; one of the two may be absent."""

    name: str
    image: Path | None
    condition: Path | None


@dataclass(frozen=True)
class Layout:
    """The folders of one data set. Each may hold the files themselves or a folder for each split."""

    folder: Path
    images: Path | None
    conditions: Path | None

    @property
    def is_ade20k(self) -> bool:
        return self.conditions is not None and self.conditions.name == ANNOTATIONS

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits; none where the files lie in the folders themselves."""
        names: set[str] = set()
        for root in (self.conditions, self.images):
            if root is None or root == self.folder:
                continue
            entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
            if not any(entry.suffix.lower() in PHOTO_SUFFIXES for entry in entries):
                names |= {entry.name for entry in entries if entry.is_dir()}
        return tuple(sorted(names))

    def of_split(self, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """The images and the conditions of a split by their names; a folder without splits is all `training`.

        Raises:
            UserError: No such split, or two files of one name.
        """
        known = self.splits or ("training",)
        if split not in known:
            only = "" if self.splits else ", as its folders hold files and no folders"
            raise UserError(
                f"{self.folder}: no split {split!r}; it has {', '.join(known)}{only}.{did_you_mean(split, known)}"
            )
        inside = split if self.splits else "."
        images, conditions = (listed(root / inside) if root else {} for root in (self.images, self.conditions))
        return images, conditions


def find_layout(folder: Path) -> Layout:
    """The folders of images and conditions; a folder that has no such folders is one of photos.

    Raises:
        UserError: No such folder, an empty one, or a file.
    """
    if not folder.is_dir():
        what = "expected a folder, got a file" if folder.exists() else "no such folder"
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{folder}: {what}.{did_you_mean(folder.name, siblings)} Expected {LAYOUTS}")
    if (folder / "ADEChallengeData2016").is_dir():  # the archive, unpacked into a folder of its own
        folder /= "ADEChallengeData2016"
    images = _first(folder, IMAGES)
    conditions = _first(folder, (ANNOTATIONS, *CONDITIONS))
    if images is None and conditions is None:
        images = folder
    return Layout(folder, images, conditions)


def listed(folder: Path) -> dict[str, Path]:
    """The image files of a folder, by stem, in the order of their names; nothing where there is no folder.

    Raises:
        UserError: Two files of one stem.
    """
    files: dict[str, Path] = {}
    if not folder.is_dir():
        return files
    for entry in sorted(folder.iterdir()):
        if entry.suffix.lower() not in PHOTO_SUFFIXES or entry.name.startswith("."):
            continue
        if entry.stem in files:
            raise UserError(f"{folder}: {files[entry.stem].name} and {entry.name} have one name; remove one of them")
        files[entry.stem] = entry
    return files


def matched(images: Mapping[str, Path], conditions: Mapping[str, Path]) -> list[Files]:
    """Pairs by name. Where there are no images at all, they are conditions to draw from.

    Raises:
        UserError: Images without condition, or conditions without image.
    """
    faults = []
    if images:
        faults += lacking("image", "condition", images, conditions)
        faults += lacking("condition", "image", conditions, images)
    if faults:
        raise UserError("\n".join(f"{fault}; `ether-diffusion data check` lists all" for fault in faults))
    return [Files(name, images.get(name), path) for name, path in conditions.items()]


def lacking(a: str, b: str, first: Mapping[str, Path], second: Mapping[str, Path]) -> list[str]:
    """A line that says how many of the first have no counterpart, or none."""
    names = [name for name in first if name not in second]
    if not names:
        return []
    folder = first[names[0]].parent
    return [f"{folder}: {len(names):,} of {len(first):,} {a}s without {b}: {shown(first[name].name for name in names)}"]


def shown(names: Iterable[str], most: int = 3) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)

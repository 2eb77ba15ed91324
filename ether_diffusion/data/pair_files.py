"""The folders of a data set's images and conditions; files of one name belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.data.builtin import builtin_scenes
from ether_diffusion.data.photos import OTHER_SUFFIXES, PHOTO_SUFFIXES
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.input_files import check_folder, list_folder, same_name

IMAGES = ("images", "target")
CONDITIONS = ("conditions", "conditioning_images", "source")
ANNOTATIONS = "annotations"
"""ADE20K's name for its folder of label maps."""

LAYOUTS = (
    "images/ and annotations/ (ADEChallengeData2016), images/ and conditions/, "
    "JSON lines that name image and condition, or photos with data.condition=canny"
)


@dataclass(frozen=True)
class Pair:
    """One image, its condition and its caption. Without image: a condition to generate from. Without condition: a
    preprocessor computes it from the image."""

    name: str
    image: Path | None
    condition: Path | None
    caption: str = ""


@dataclass(frozen=True)
class Layout:
    """The folders of one data set. Each may hold the files themselves or a folder for each split."""

    folder: Path
    images: Path | None
    conditions: Path | None

    @property
    def is_ade20k(self) -> bool:
        """Whether the conditions are ADE20K's label maps."""
        return self.conditions is not None and self.conditions.name == ANNOTATIONS

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits; none where the folders hold the files themselves."""
        names: set[str] = set()
        for root in (self.conditions, self.images):
            if root is None or root == self.folder:
                continue
            entries = list_folder(root)
            if not any(entry.suffix.lower() in PHOTO_SUFFIXES for entry in entries):
                names |= {entry.name for entry in entries if entry.is_dir()}
        return tuple(sorted(names))

    def of_split(self, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """The images and the conditions of a split by name; a folder without splits is all `training`.

        Raises:
            UserError: No such split, or two files of one name.
        """
        known = self.splits or ("training",)
        if split not in known:
            only = "" if self.splits else ", because its folders hold files, not folders of splits"
            raise UserError(
                f"{self.folder}: no split {split!r}; it has {', '.join(known)}{only}.{did_you_mean(split, known)}"
            )
        inside = split if self.splits else "."
        images, conditions = (list_images(root / inside) if root else {} for root in (self.images, self.conditions))
        return images, conditions


def find_layout(dataset_dir: str | Path, cache_dir: Path | None = None) -> Layout:
    """The folders of images and conditions; a folder without such folders is one of photos.

    Args:
        dataset_dir: A folder, or `builtin:scenes`, which is rendered where `cache_dir` does not have it.

    Raises:
        UserError: No such folder, an empty one, or a file.
    """
    if str(dataset_dir).startswith("builtin:"):
        folder = builtin_scenes(str(dataset_dir), cache_dir)
    else:
        folder = Path(dataset_dir).expanduser()
    check_folder(folder, LAYOUTS)
    if (folder / "ADEChallengeData2016").is_dir():  # the archive, unpacked into a folder of its own
        folder /= "ADEChallengeData2016"
    images = _first(folder, IMAGES)
    conditions = _first(folder, (ANNOTATIONS, *CONDITIONS))
    if images is None and conditions is None:
        images = folder
    return Layout(folder, images, conditions)


def list_images(folder: Path) -> dict[str, Path]:
    """The image files of a folder by stem, in the order of their names; none where there is no folder.

    Raises:
        UserError: Two files of one stem; photos in formats that cannot be read, such as HEIC.
    """
    files: dict[str, Path] = {}
    if not folder.is_dir():
        return files
    entries = list_folder(folder)
    if unreadable := [entry.name for entry in entries if entry.suffix.lower() in OTHER_SUFFIXES]:
        count = f"{len(unreadable):,} photos in a format that cannot be read: {first_names(unreadable)}"
        raise UserError(f"{folder}: {count}; export them as JPEG or PNG, or move them away")
    for entry in entries:
        if entry.suffix.lower() in PHOTO_SUFFIXES:
            other = files.setdefault(same_name(entry.stem), entry)
            if other != entry:
                raise UserError(f"{folder}: {other.name} and {entry.name} have the same name; remove one of them")
    return files


def matched(images: Mapping[str, Path], conditions: Mapping[str, Path]) -> list[Pair]:
    """Pairs by name. Without any images, the pairs are conditions to generate from.

    Raises:
        UserError: Images without condition, or conditions without image.
    """
    sides = (("image", images, "condition", conditions), ("condition", conditions, "image", images))
    faults = []
    for kind, files, other, counterparts in sides if images else ():
        if alone := [path for name, path in files.items() if name not in counterparts]:
            count = f"{len(alone):,} of {len(files):,} {kind}s without {other}: {first_names(p.name for p in alone)}"
            faults.append(f"{alone[0].parent}: {count}; `ether-diffusion data check` lists all")
    if faults:
        raise UserError("\n".join(faults))
    return [Pair(name, images.get(name), path) for name, path in conditions.items()]


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)

"""ADE20K's scene parsing folders (ADEChallengeData2016): images/SPLIT/*.jpg with annotations/SPLIT/*.png."""

from __future__ import annotations

from pathlib import Path

from ether_diffusion.errors import UserError, did_you_mean


def is_ade20k(folder: Path) -> bool:
    """Has `annotations/`, with splits in it."""
    annotations = folder / "annotations"
    return annotations.is_dir() and any(entry.is_dir() for entry in annotations.iterdir())


def splits(folder: Path) -> list[str]:
    """The splits that have label maps."""
    return sorted(entry.name for entry in (folder / "annotations").iterdir() if entry.is_dir())


def split_folders(folder: Path, split: str) -> tuple[Path, Path]:
    """The folders of a split's images, which may be absent, and of its label maps.

    Raises:
        UserError: No such split.
    """
    known = splits(folder)
    if split not in known:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(known)}.{did_you_mean(split, known)}")
    return folder / "images" / split, folder / "annotations" / split

"""Pairs of image and condition with a caption: ADE20K's folders, folders of pairs, or photos and a preprocessor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ether_diffusion.data.ade20k import is_ade20k, split_folders
from ether_diffusion.data.palettes import read_classes
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
    """labels | image | the name of a preprocessor."""
    palette: np.ndarray | None = None
    """(N + 1, 3) uint8, row 0 unlabelled; None unless `kind` is labels."""
    names: tuple[str, ...] = ()
    """Of the labels 1 to N, where the data set tells them."""
    notes: tuple[str, ...] = ()
    """What the user should hear, one line each."""

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
    """The pairs of a split.

    Raises:
        UserError: What is wrong with folder, split, captions or conditions.
    """
    if str(dataset_dir).startswith("builtin:"):
        from ether_diffusion.data.builtin import builtin_scenes

        dataset_dir = builtin_scenes(str(dataset_dir), cache_dir)
    folder = Path(dataset_dir).expanduser()
    if not is_ade20k(folder):
        raise UserError(f"{folder}: no ADEChallengeData2016 folder")
    images, maps = split_folders(folder, split)
    lines = folder / "captions" / f"{split}.jsonl"
    rows = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    by_name = {Path(row["target"]).stem: row["prompt"] for row in rows}
    pairs = [
        Pair(path.stem, images / f"{path.stem}.jpg", path, by_name[path.stem]) for path in sorted(maps.glob("*.png"))
    ]
    classes = read_classes(folder)
    return Pairs(str(dataset_dir), split, tuple(pairs[:limit]), "labels", classes.palette, classes.names)

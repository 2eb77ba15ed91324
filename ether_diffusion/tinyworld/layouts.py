"""The miniature on disk, in the layouts of the real data sets: ADEChallengeData2016 with captions, and photo folders.

python -m ether_diffusion.tinyworld.layouts --to data/tiny_ade --scenes 100 --split training validation
python -m ether_diffusion.tinyworld.layouts --to data/robot --subject robot
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.pictures import save_png
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos
from ether_diffusion.tinyworld.phrasing import caption
from ether_diffusion.tinyworld.render import LABELS, PALETTE, render
from ether_diffusion.tinyworld.scenes import Split, sample_scene

SplitName = Literal["training", "validation"]

# The seeds of the scenes that the command writes; pretraining takes none from ten million on.
FIRST_SEEDS: dict[SplitName, int] = {"training": 20_000_000, "validation": 30_000_000}

_PREFIXES: dict[SplitName, str] = {"training": "ADE_train", "validation": "ADE_val"}


def write_ade20k_like(
    folder: str | Path, seeds: Sequence[int], split_name: SplitName = "validation", *, split: Split = "train"
) -> Path:
    """Writes one split: `write_ade20k_splits(folder, {split_name: seeds})`."""
    return write_ade20k_splits(folder, {split_name: seeds}, split=split)


def write_ade20k_splits(
    folder: str | Path, seeds: Mapping[SplitName, Sequence[int]], *, split: Split = "train", shown: bool = False
) -> Path:
    """Writes scenes as an ADEChallengeData2016 folder, whole or not at all.

    `images/validation/ADE_val_00000001.jpg`; `annotations/validation/ADE_val_00000001.png`, grey label numbers;
    `objectInfo23.txt`, the classes, their shares of the pixels and how many images of each split have them;
    `color23.csv`, the palette; `captions/validation.jsonl`, a line an image: its label map as source, the image as
    target, and its prompt.

    Args:
        folder: Absent or empty.
        seeds: Of the scenes of "training", of "validation" or of both.
        split: As for `sample_scene`; captions of "held_out" scenes are phrasings held out, too.
        shown: A progress bar.

    Raises:
        UserError: The folder is not empty, or no such split.
    """
    for name in seeds:
        if name not in _PREFIXES:
            raise UserError(f"split {name!r}; expected 'training' or 'validation'.{did_you_mean(name, _PREFIXES)}")
    pixels = np.zeros(len(LABELS), np.int64)
    images: dict[SplitName, np.ndarray] = {name: np.zeros(len(LABELS), np.int64) for name in _PREFIXES}
    total = sum(map(len, seeds.values()))
    with _whole(folder) as partial, progress_bar(total, "drawing", "scene", shown=shown) as bar:
        for name, chosen in seeds.items():
            for kind in ("images", "annotations"):
                (partial / kind / name).mkdir(parents=True)
            lines = []
            for number, seed in enumerate(chosen, 1):
                scene = sample_scene(seed, split)
                image, labels = render(scene)
                stem = f"{name}/{_PREFIXES[name]}_{number:08d}"
                source, target = f"annotations/{stem}.png", f"images/{stem}.jpg"
                image.save(partial / target, quality=95, subsampling=0)
                Image.fromarray(labels).save(partial / source)
                prompt = caption(scene, seed, held_out=split == "held_out")
                lines.append(json.dumps({"source": source, "target": target, "prompt": prompt}) + "\n")
                counts = np.bincount(labels.ravel(), minlength=len(LABELS))
                pixels += counts
                images[name] += counts > 0
                bar.update()
            (partial / "captions").mkdir(exist_ok=True)
            (partial / "captions" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        _write_classes(partial, pixels, images)
    return Path(folder)


def write_photo_folder(folder: str | Path, subject: str) -> Path:
    """Writes the photos of a subject in `SUBJECTS` as `00.png`, `01.png`, …, whole or not at all.

    Raises:
        UserError: The folder is not empty, or no such subject.
    """
    if subject not in SUBJECTS:
        raise UserError(f"no subject {subject!r}.{did_you_mean(subject, SUBJECTS)} Subjects: {', '.join(SUBJECTS)}")
    with _whole(folder) as partial:
        for number, photo in enumerate(render_photos(subject)):
            save_png(photo, partial / f"{number:02d}.png")
    return Path(folder)


def _write_classes(folder: Path, pixels: np.ndarray, images: Mapping[SplitName, np.ndarray]) -> None:
    count = len(LABELS) - 1
    rows = [["Idx", "Ratio", "Train", "Val", "Name"]]
    for label in range(1, len(LABELS)):
        ratio = pixels[label] / max(1, pixels.sum())
        numbers = [str(images[name][label]) for name in ("training", "validation")]
        rows.append([str(label), f"{ratio:.4f}", *numbers, LABELS[label]])
    (folder / f"objectInfo{count}.txt").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    with (folder / f"color{count}.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "red", "green", "blue", "name"])
        table.writerows([label, *PALETTE[label].tolist(), LABELS[label]] for label in range(1, len(LABELS)))


@contextmanager
def _whole(folder: str | Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place when all is written and goes when something fails."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; name one that is empty or does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ether_diffusion.tinyworld.layouts",
        description="Writes scenes of the miniature as an ADEChallengeData2016 folder, or a subject's photos.",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="absent or empty")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scenes", type=int, metavar="N", help="scenes a split")
    what.add_argument("--subject", metavar="NAME", help=f"photos of one of: {', '.join(SUBJECTS)}")
    parser.add_argument("--split", nargs="+", choices=tuple(_PREFIXES), default=["validation"])
    parser.add_argument(
        "--held-out", action="store_true", help="scenes and phrasings that pretraining never sees in kind"
    )
    options = parser.parse_args(arguments)
    try:
        if options.subject is not None:
            write_photo_folder(options.to, options.subject)
        else:
            if options.scenes < 1:
                raise UserError(f"--scenes {options.scenes}; expected at least 1")
            seeds = {name: range(FIRST_SEEDS[name], FIRST_SEEDS[name] + options.scenes) for name in options.split}
            write_ade20k_splits(options.to, seeds, split="held_out" if options.held_out else "train", shown=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

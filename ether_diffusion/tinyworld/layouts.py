"""The miniature on disk, in the layouts of the real data sets: ADEChallengeData2016 with captions, and photo folders.

python -m ether_diffusion.tinyworld.layouts --to data/tiny_ade --scenes 100 --split training validation
python -m ether_diffusion.tinyworld.layouts --to data/robot --subject robot
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.exit_codes import exit_code
from ether_diffusion.files import check_free, whole_folder
from ether_diffusion.pictures import save_png
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos
from ether_diffusion.tinyworld.phrasing import caption
from ether_diffusion.tinyworld.render import LABELS, PALETTE, render
from ether_diffusion.tinyworld.scenes import Split, sample_scene

SplitName = Literal["training", "validation"]

# The seeds of the scenes that the command writes; pretraining uses no seeds from ten million on.
FIRST_SEEDS: dict[SplitName, int] = {"training": 20_000_000, "validation": 30_000_000}

_PREFIXES: dict[SplitName, str] = {"training": "ADE_train", "validation": "ADE_val"}


def write_ade20k_splits(
    folder: str | Path, seeds: Mapping[SplitName, Sequence[int]], *, split: Split = "train", shown: bool = False
) -> Path:
    """Write scenes as an ADEChallengeData2016 folder, whole or not at all. Arguments: see `fill_ade20k_folder`.

    Raises:
        UserError: The folder is not empty, or no such split.
    """
    with whole_folder(_free(folder), sync=False) as partial:
        fill_ade20k_folder(partial, seeds, split=split, shown=shown)
    return Path(folder)


def fill_ade20k_folder(
    folder: Path, seeds: Mapping[SplitName, Sequence[int]], *, split: Split = "train", shown: bool = False
) -> None:
    """Render scenes into an empty folder, in the layout of ADEChallengeData2016.

    `images/validation/ADE_val_00000001.jpg`; `annotations/validation/ADE_val_00000001.png`, grey label numbers;
    `objectInfo23.txt`, the classes, their shares of the pixels and the number of images of each split that show them;
    `color23.csv`, the palette; `captions/validation.jsonl`, one line per image: its label map as source, the image as
    target, and its prompt.

    Args:
        seeds: The seeds of the scenes of "training", of "validation" or of both.
        split: As for `sample_scene`; captions of "held_out" scenes are held-out phrasings, too.
        shown: Show a progress bar.

    Raises:
        UserError: No such split.
    """
    for name in seeds:
        if name not in _PREFIXES:
            raise UserError(f"split {name!r}; expected 'training' or 'validation'.{did_you_mean(name, _PREFIXES)}")
    pixels = np.zeros(len(LABELS), np.int64)
    images: dict[SplitName, np.ndarray] = {name: np.zeros(len(LABELS), np.int64) for name in _PREFIXES}
    (folder / "captions").mkdir()
    with progress_bar(sum(map(len, seeds.values())), "rendering", "scene", shown=shown) as bar:
        for name, chosen in seeds.items():
            for kind in ("images", "annotations"):
                (folder / kind / name).mkdir(parents=True)
            lines = []
            for number, seed in enumerate(chosen, 1):
                scene = sample_scene(seed, split)
                image, labels = render(scene)
                stem = f"{name}/{_PREFIXES[name]}_{number:08d}"
                source, target = f"annotations/{stem}.png", f"images/{stem}.jpg"
                image.save(folder / target, quality=95, subsampling=0)
                Image.fromarray(labels).save(folder / source)
                prompt = caption(scene, seed, held_out=split == "held_out")
                lines.append(json.dumps({"source": source, "target": target, "prompt": prompt}) + "\n")
                counts = np.bincount(labels.ravel(), minlength=len(LABELS))
                pixels += counts
                images[name] += counts > 0
                bar.update()
            (folder / "captions" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    _write_classes(folder, pixels, images)


def write_photo_folder(folder: str | Path, subject: str) -> Path:
    """Write the photos of a subject in `SUBJECTS` as `00.png`, `01.png`, …, whole or not at all.

    Raises:
        UserError: The folder is not empty, or no such subject.
    """
    if subject not in SUBJECTS:
        raise UserError(f"no subject {subject!r}.{did_you_mean(subject, SUBJECTS)} Subjects: {', '.join(SUBJECTS)}")
    with whole_folder(_free(folder), sync=False) as partial:
        for number, photo in enumerate(render_photos(subject)):
            save_png(photo, partial / f"{number:02d}.png", sync=False)
    return Path(folder)


def _free(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    check_free(path, "--to", "Name another folder, new or empty.")
    return path


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ether_diffusion.tinyworld.layouts",
        description="Writes scenes of the miniature as an ADEChallengeData2016 folder, or a subject's photos.",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder to write, new or empty")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scenes", type=int, metavar="N", help="number of scenes per split")
    what.add_argument("--subject", metavar="NAME", help=f"write the photos of one of: {', '.join(SUBJECTS)}")
    parser.add_argument("--split", nargs="+", choices=tuple(_PREFIXES), default=["validation"])
    parser.add_argument(
        "--held-out", action="store_true", help="scenes and phrasings of kinds that pretraining never sees"
    )
    options = parser.parse_args(arguments)

    def write() -> None:
        if options.subject is not None:
            write_photo_folder(options.to, options.subject)
        elif options.scenes < 1:
            raise UserError(f"--scenes {options.scenes}; expected at least 1")
        else:
            seeds = {name: range(FIRST_SEEDS[name], FIRST_SEEDS[name] + options.scenes) for name in options.split}
            write_ade20k_splits(options.to, seeds, split="held_out" if options.held_out else "train", shown=True)

    return exit_code("layouts", write)


if __name__ == "__main__":
    sys.exit(main())

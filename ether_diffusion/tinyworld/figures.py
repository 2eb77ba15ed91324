"""The figures of the miniature's model card: how well it draws, and how far its judges can be trusted.

`python -m ether_diffusion.tinyworld.figures` measures the shipped weights. Judges are scored on rendered scenes first,
which the base did not draw; then they score what it draws from captions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from ether_diffusion.progress import progress_bar
from ether_diffusion.quiet import quiet_dependencies
from ether_diffusion.randomness import generator

from . import WEIGHTS
from .phrasing import SCENE, WHERE, caption
from .render import LABELS, render
from .scenes import KINDS, Scene, Split, sample_scene, sample_view
from .scoring import Scorers, load_scorers, to_pixels

FRESH = 20_000_000  # scenes from this seed on: unseen by every stage of the making
PRESENT = 40  # pixels of a class, a hundredth of the picture, from which on it counts as there
GUIDANCE, STEPS = 6.0, 25

SPLITS: dict[Split, str] = {
    "train": "combinations and phrasings of pretraining",
    "held_out": "held out of pretraining",
}
Figures = dict[str, float]


@dataclass(frozen=True)
class Named:
    """What a caption says of its scene, and so can be asked of a picture: kinds, (kind, colour) pairs, the setting."""

    kinds: tuple[str, ...]
    colours: tuple[tuple[str, str], ...]
    setting: str | None


def named(scene: Scene, text: str) -> Named:
    """What `text` names of the scene that it describes."""
    words = text.split()
    colours = [(thing.kind, thing.colour) for thing in scene.things if f"{thing.colour} {thing.kind}" in text]
    setting = scene.setting if any(phrase in text for phrase in WHERE[scene.setting] + SCENE[scene.setting]) else None
    return Named(tuple(thing.kind for thing in scene.things if thing.kind in words), tuple(colours), setting)


def recognised(judges: Scorers, images: Sequence[Image.Image], wanted: Sequence[Named]) -> Figures:
    """Shares of what was named that the judges find in the pictures.

    `class`: the segmenter gives it at least 40 pixels. `colour`: CLIP, between the class's colours, picks it in the
    part of the picture around the class. `setting`: CLIP, between the eight, picks it.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for image, labels, one in zip(images, judges.segment(images), wanted, strict=True):
        for kind in one.kinds:
            hits["class"].append(int((labels == LABELS.index(kind)).sum()) >= PRESENT)
        for kind, colour in one.colours:
            hits["colour"].append(_colour_of(judges, image, labels == LABELS.index(kind), kind) == colour)
    asked = [(image, one.setting) for image, one in zip(images, wanted, strict=True) if one.setting]
    for found, (_, setting) in zip(judges.settings([image for image, _ in asked]), asked, strict=True):
        hits["setting"].append(found == setting)
    return {name: float(np.mean(found)) for name, found in sorted(hits.items())}


def _colour_of(judges: Scorers, image: Image.Image, mask: np.ndarray, kind: str) -> str | None:
    if mask.sum() < PRESENT:
        return None
    rows, columns = np.nonzero(mask)
    side = max(np.ptp(rows), np.ptp(columns)) / 2 + 4
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    part = image.crop((round(x - side), round(y - side), round(x + side), round(y + side)))
    colours = KINDS[kind].colours
    return colours[
        judges.choose([part], [[f"a {colour} {kind}", f"a photo of a {colour} {kind}"] for colour in colours])[0]
    ]


def measure(folder: Path = WEIGHTS, count: int = 500) -> dict[str, Figures]:
    """All figures, by heading, on `count` scenes a split; minutes on two CPU cores.

    Weights without a UNet have none of generated pictures.
    """
    judges = load_scorers(folder)
    vae = AutoencoderKL.from_pretrained(folder / "pipeline", subfolder="vae", torch_dtype=torch.float32)
    result: dict[str, Figures] = {}
    for split, title in SPLITS.items():
        scenes, texts = fresh_scenes(count, split)
        wanted = [named(scene, text) for scene, text in zip(scenes, texts, strict=True)]
        rendered = [render(scene) for scene in scenes]
        renders = [image for image, _ in rendered]
        truth = np.stack([labels for _, labels in rendered])
        result[f"renders, {title}"] = {
            "PSNR of the autoencoder, dB": reconstruction(vae, renders),
            "mIoU of the segmenter": mean_iou(judges.segment(renders), truth),
            **recognised(judges, renders, wanted),
        }
        if (folder / "pipeline/unet").is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
            result[f"generated, {title}"] = recognised(
                judges, sample_captions(pipeline, texts, f"figures/{split}"), wanted
            )
    result["the backbone"] = {"same individual elsewhere, of 127": individuals(judges, 256)}
    return result


def fresh_scenes(count: int, split: Split) -> tuple[list[Scene], list[str]]:
    """Scenes that no stage was trained on, with a caption each; held-out ones in held-out phrasings."""
    scenes = [sample_scene(FRESH + k, split) for k in range(count)]
    return scenes, [caption(scene, FRESH + k, held_out=split == "held_out") for k, scene in enumerate(scenes)]


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: Sequence[Image.Image]) -> float:
    """Peak signal to noise, mean over pictures, in decibels."""
    found = []
    for pixels in to_pixels(images).split(64):
        latents = vae.encode(pixels).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        drawn = vae.decode(latents).sample.clamp(-1, 1)  # pyright: ignore[reportAttributeAccessIssue]
        found.append(10 * torch.log10(4 / (drawn - pixels).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(found).mean())


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Over the whole set, labelled pixels only: the mean over labels of intersection over union."""
    known = truth > 0
    scores = []
    for label in range(1, len(LABELS)):
        either = ((predicted == label) | (truth == label)) & known
        if either.any():
            scores.append(((predicted == label) & (truth == label)).sum() / either.sum())
    return float(np.mean(scores))


def individuals(judges: Scorers, count: int) -> float:
    """How often the nearest of 127 other views shows the same individual."""
    hits = []
    for start in range(0, count, 64):
        views = [render(sample_view(2 * (FRESH + start) + k))[0] for k in range(128)]
        features = judges.identity(views)
        nearest = (features @ features.T).fill_diagonal_(-1).argmax(dim=1)
        hits.append((nearest == torch.arange(128) ^ 1).float().mean())
    return float(torch.stack(hits).mean())


@torch.no_grad()
def sample_captions(pipeline: Any, texts: Sequence[str], stream: str) -> list[Image.Image]:
    """One picture a caption from a diffusers pipeline, each from a seed of its own."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    with progress_bar(len(texts), "drawing", "image") as bar:
        for start in range(0, len(texts), 50):
            part = list(texts[start : start + 50])
            seeds = [generator(0, stream, start + k) for k in range(len(part))]
            images += pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
            bar.update(len(part))
    return images


def main() -> None:
    """Measure and print; `--count` changes the number of scenes from the card's 500."""
    parser = argparse.ArgumentParser(prog="python -m ether_diffusion.tinyworld.figures", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="DIR")
    parser.add_argument("--count", type=int, default=500, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args()
    quiet_dependencies()
    figures = measure(arguments.weights, arguments.count)
    for heading, values in figures.items():
        print(heading)
        for name, value in values.items():
            print(f"  {name:<36} {value:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

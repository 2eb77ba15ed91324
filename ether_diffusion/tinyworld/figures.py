"""The figures of the miniature's model card: the quality of its images, and the accuracy of its scorers.

`python -m ether_diffusion.tinyworld.figures` measures the shipped weights: first the scorers on rendered scenes, whose
contents are known, then, with these scorers, the images that the base generates from captions.
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
from torch import Tensor

from ether_diffusion.own_files import write_own
from ether_diffusion.progress import progress_bar
from ether_diffusion.quiet import quiet_dependencies
from ether_diffusion.randomness import generator

from . import WEIGHTS
from .phrasing import SCENE, WHERE, caption
from .render import LABELS, render
from .scenes import KINDS, Scene, Split, sample_scene, sample_view
from .scoring import Scorers, load_scorers, to_pixels

FRESH = 20_000_000  # seeds from here on: scenes that no stage of pretraining has seen
PRESENT = 40  # pixels from which on a class counts as present: a hundredth of the image
GUIDANCE, STEPS = 6.0, 25

SPLITS: dict[Split, str] = {
    "train": "combinations and phrasings of pretraining",
    "held_out": "held out of pretraining",
}
Figures = dict[str, float]


@dataclass(frozen=True)
class Named:
    """What a caption names, and an image of it must show: classes, (class, colour) pairs, the setting."""

    kinds: tuple[str, ...]
    colours: tuple[tuple[str, str], ...]
    setting: str | None


def named(scene: Scene, text: str) -> Named:
    """What `text`, a caption of the scene, names of it."""
    words = text.split()
    colours = [(thing.kind, thing.colour) for thing in scene.things if f"{thing.colour} {thing.kind}" in text]
    setting = scene.setting if any(phrase in text for phrase in WHERE[scene.setting] + SCENE[scene.setting]) else None
    return Named(tuple(thing.kind for thing in scene.things if thing.kind in words), tuple(colours), setting)


def recognised(scorers: Scorers, images: Sequence[Image.Image], wanted: Sequence[Named]) -> Figures:
    """Shares of what the captions name that the scorers find in the images.

    `class`: the segmenter gives it at least 40 pixels. `colour`: CLIP chooses it among the class's colours, for the
    part of the image around the class. `setting`: CLIP chooses it among the eight.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for image, labels, one in zip(images, scorers.segment(images), wanted, strict=True):
        for kind in one.kinds:
            hits["class"].append(int((labels == LABELS.index(kind)).sum()) >= PRESENT)
        for kind, colour in one.colours:
            hits["colour"].append(_colour_of(scorers, image, labels == LABELS.index(kind), kind) == colour)
    stated = [(image, one.setting) for image, one in zip(images, wanted, strict=True) if one.setting]
    for found, (_, setting) in zip(scorers.settings([image for image, _ in stated]), stated, strict=True):
        hits["setting"].append(found == setting)
    return {name: float(np.mean(found)) for name, found in sorted(hits.items())}


def _colour_of(scorers: Scorers, image: Image.Image, mask: np.ndarray, kind: str) -> str | None:
    if mask.sum() < PRESENT:
        return None
    rows, columns = np.nonzero(mask)
    side = max(np.ptp(rows), np.ptp(columns)) / 2 + 4
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    part = image.crop((round(x - side), round(y - side), round(x + side), round(y + side)))
    colours = KINDS[kind].colours
    texts = [[f"a {colour} {kind}", f"a photo of a {colour} {kind}"] for colour in colours]
    return colours[scorers.choose([part], texts)[0]]


def measure(folder: Path = WEIGHTS, count: int = 500) -> dict[str, Figures]:
    """All figures by heading, on `count` scenes per split; takes minutes on two CPU cores.

    Weights without a UNet have no figures of generated images.
    """
    scorers = load_scorers(folder)
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
            "mIoU of the segmenter": mean_iou(scorers.segment(renders), truth),
            **recognised(scorers, renders, wanted),
        }
        if (folder / "pipeline/unet").is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
            result[f"generated, {title}"] = recognised(
                scorers, sample_captions(pipeline, texts, f"figures/{split}"), wanted
            )
    result["the backbone"] = {"same individual elsewhere, of 127": individuals(scorers, 256)}
    return result


def fresh_scenes(count: int, split: Split) -> tuple[list[Scene], list[str]]:
    """Scenes that no stage was trained on, each with a caption; held-out scenes have held-out phrasings."""
    scenes = [sample_scene(FRESH + k, split) for k in range(count)]
    return scenes, [caption(scene, FRESH + k, held_out=split == "held_out") for k, scene in enumerate(scenes)]


def reconstruction(vae: AutoencoderKL, images: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of the autoencoder, mean over images, in decibels."""
    pixels = to_pixels(images)
    return float(psnr((reconstruct(vae, pixels) - pixels).square().mean(dim=(1, 2, 3))).mean())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(B, 3, 64, 64) in ±1, encoded to the latents' means and decoded."""
    parts = []
    for part in pixels.split(64):
        latents = vae.encode(part).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        parts.append(vae.decode(latents).sample)  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat(parts).clamp(-1, 1)


def psnr(squared_error: Tensor) -> Tensor:
    """Decibels, from mean squared errors of pixels in ±1."""
    return 10 * torch.log10(4 / squared_error.detach().clamp(min=1e-10))


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean over labels of intersection over union, on the labelled pixels of the whole set."""
    known = truth > 0
    scores = []
    for label in range(1, len(LABELS)):
        either = ((predicted == label) | (truth == label)) & known
        if either.any():
            scores.append(((predicted == label) & (truth == label)).sum() / either.sum())
    return float(np.mean(scores))


def individuals(scorers: Scorers, count: int) -> float:
    """The share of views whose nearest of 127 other views shows the same individual."""
    hits = []
    for start in range(0, count, 64):
        views = [render(sample_view(2 * (FRESH + start) + k))[0] for k in range(128)]
        features = scorers.identity(views)
        nearest = (features @ features.T).fill_diagonal_(-1).argmax(dim=1)
        hits.append((nearest == torch.arange(128) ^ 1).float().mean())
    return float(torch.stack(hits).mean())


@torch.no_grad()
def sample_captions(pipeline: Any, texts: Sequence[str], stream: str) -> list[Image.Image]:
    """One image per caption from a diffusers pipeline, each from a seed of its own."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    with progress_bar(len(texts), "sampling", "image") as bar:
        for start in range(0, len(texts), 50):
            part = list(texts[start : start + 50])
            seeds = [generator(0, stream, start + k) for k in range(len(part))]
            images += pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
            bar.update(len(part))
    return images


def main() -> None:
    """Measure and print; the card has 500 scenes per split (`--count`)."""
    parser = argparse.ArgumentParser(prog="python -m ether_diffusion.tinyworld.figures", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="DIR")
    parser.add_argument("--count", type=int, default=500, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    quiet_dependencies()
    figures = measure(arguments.weights, arguments.count)
    for heading, values in figures.items():
        print(heading)
        for name, value in values.items():
            print(f"  {name:<36} {value:.3f}")
    if arguments.json:
        write_own(arguments.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

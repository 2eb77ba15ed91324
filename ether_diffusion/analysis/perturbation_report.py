"""A frozen base under random transforms: images, scores as a table and a plot, and the command (paper, Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ether_diffusion.adapters.targets import check_targets, resolved_target, target_modules
from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherConfig
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import TINY
from ether_diffusion.models.families.table import denoiser_of
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.figures import GUIDANCE, Named, fresh_scenes, named, recognised
from ether_diffusion.tinyworld.scoring import Scorers, load_scorers

from . import plots
from .output import check_outputs, plot, write_command, write_table
from .perturbation import PERTURBATIONS, Perturbation, perturbed, widths_of

EXAMPLES = 2
"""Prompts whose images `grid.png` shows."""

Shown = Mapping[tuple[int, str], Mapping[float, Image.Image]]
"""Images by (prompt, method) and distance."""


@dataclass(frozen=True)
class Perturbations:
    """Which transforms are put on which base, and what it generates under them.

    Attributes:
        prompts: None: `count` captions of the miniature's world, scored by its scorers.
        draws: Of random transforms at every distance.
        num_blocks: Default: each method's in the paper.
        target: A preset, or names of layers.
        guidance: Default: the miniature's on the base `tiny`, else 7.5.
    """

    base_model: str
    prompts: Sequence[str] | None
    count: int
    methods: Sequence[str]
    distances: Sequence[float]
    draws: int
    num_blocks: int | None
    target: Sequence[str]
    steps: int
    guidance: float | None
    batch_size: int
    seed: int
    device: str | None


def write_perturbations(settings: Perturbations, output: Path, command: str) -> list[dict[str, Any]]:
    """Generate and score; write `perturbation.csv` with a plot, and images as `grid.png`.

    Raises:
        UserError: as `load_pipeline`, `check_targets` and `plan`; or as `check_outputs`. Nothing is written then.
    """
    check_outputs(output, "perturbation.csv", plots=("perturbation", "grid"))
    if settings.prompts is None:
        scenes, prompts = fresh_scenes(settings.count, "train")
        wanted = [named(scene, text) for scene, text in zip(scenes, prompts, strict=True)]
        scorers = load_scorers()
    else:
        prompts, wanted, scorers = settings.prompts, [], None
    pipeline, _ = load_pipeline(base_model=settings.base_model, device=settings.device)
    target = settings.target[0] if len(settings.target) == 1 else list(settings.target)
    denoiser = denoiser_of(pipeline)
    chosen = resolved_target(target, denoiser) or target
    layers = check_targets(denoiser, EtherConfig(target_modules=target_modules(chosen)), chosen)
    options = {"draws": settings.draws, "num_blocks": settings.num_blocks}
    trials = plan(denoiser, layers, settings.methods, settings.distances, **options)
    guidance = settings.guidance or (GUIDANCE if settings.base_model == TINY else 7.5)
    sampling, jobs = Sampling(steps=settings.steps, guidance=guidance), jobs_for(prompts, 1)

    def images() -> list[Image.Image]:
        found = sample_images(pipeline, jobs, sampling, seed=settings.seed, batch_size=settings.batch_size)
        return [image for _, image in found]

    base = images()
    facts = {"method": "base", "num_blocks": 0, "distance": 0.0, "k": 0, "images": len(base)}
    rows: list[dict[str, Any]] = [{**facts, **scores(base, base, scorers, wanted)}]
    shown: dict[tuple[int, str], dict[float, Image.Image]] = {}
    with progress_bar(len(trials), "perturbations", "trial") as bar:
        for trial, found in sweep(denoiser, layers, trials, images, settings.seed):
            facts = {"method": trial.title, "num_blocks": trial.num_blocks, "distance": trial.distance, "k": trial.k}
            rows.append({**facts, "images": len(found), **scores(found, base, scorers, wanted)})
            for example in range(min(EXAMPLES, len(found)) if trial.k == 0 else 0):
                shown.setdefault((example, trial.title), {0.0: base[example]})[trial.distance] = found[example]
            bar.update()
    write_command(output, command)
    write_table(output / "perturbation.csv", rows)
    _plot_images(output / "grid", command, rows[1:], shown)
    _plot_scores(output / "perturbation", command, rows[1:], rows[0])
    return rows


def _plot_images(path: Path, command: str, rows: Sequence[Mapping[str, Any]], shown: Shown) -> None:
    """A row a prompt and method, a column a distance."""
    distances = sorted({row["distance"] for row in rows})
    labelled = [(title, images) for (_, title), images in sorted(shown.items(), key=lambda item: item[0][0])]
    cells = {"rows": len(labelled), "columns": len(distances) + 1}
    size = (0.5 + 1.05 * cells["columns"], 0.4 + 1.05 * cells["rows"])
    with plot(path, command, **cells, size=size) as axes:
        plots.grid(axes, labelled, distances)


def _plot_scores(path: Path, command: str, rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> None:
    panels = {"recognised": "named things that the scorers recognise, share", "pixels": "RMS difference of pixels"}
    panels = {name: label for name, label in panels.items() if name in base}
    with plot(path, command, columns=len(panels), size=(5 * len(panels), 4.4)) as axes:
        for one, (name, label) in zip(axes, panels.items(), strict=True):
            plots.strength(one, rows, name, label, base[name] if name == "recognised" else None)
            one.set_ylim(bottom=0)
        axes[0].set_title("What is left under random transforms" if "recognised" in base else "")
        axes[-1].set_title("How far images are from the base's own")
        plots.legend_below(axes[0])


Images = Sequence[Image.Image]


@dataclass(frozen=True)
class Trial:
    """The k-th sample of random transforms of one kind at one distance."""

    method: str
    num_blocks: int
    distance: float
    k: int

    @property
    def title(self) -> str:
        return PERTURBATIONS[self.method].title


def plan(
    model: nn.Module,
    layers: Sequence[str],
    methods: Sequence[str],
    distances: Sequence[float],
    *,
    draws: int = 1,
    num_blocks: int | None = None,
) -> list[Trial]:
    """The trials of each method at the distances that it can have on these layers, and at the largest if it reaches it.

    Args:
        draws: Samples at every distance.
        num_blocks: Default: the paper's for each method.

    Raises:
        UserError: a method cannot have any of the distances, or not this number of blocks.
    """
    trials = []
    for method in methods:
        kind = PERTURBATIONS[method]
        blocks = num_blocks or kind.num_blocks
        widths = {width for name in layers for width in widths_of(name, model.get_submodule(name), kind, blocks)}
        possible = possible_distances(kind, sorted(widths), blocks, distances)
        if not possible:
            given = ", ".join(f"{distance:g}" for distance in distances)
            raise UserError(
                f"{kind.title} with {blocks} blocks can have none of the distances {given} on these layers."
            )
        trials += [Trial(method, blocks, distance, k) for distance in possible for k in range(draws)]
    return trials


def possible_distances(
    kind: Perturbation, widths: Sequence[int], num_blocks: int, distances: Sequence[float]
) -> list[float]:
    """The `distances` that a transform can have on sides of these widths, and its bound if it reaches it."""
    bound = min(kind.bound(width, num_blocks) for width in widths)
    below = [] if kind.fixed else sorted({d for d in distances if 0 < d < bound and not math.isclose(d, bound)})
    return [*below, bound] if kind.reached else below


def sweep(
    model: nn.Module, layers: Sequence[str], trials: Sequence[Trial], sample: Callable[[], Images], seed: int = 0
) -> Iterator[tuple[Trial, Images]]:
    """What `sample` generates in every trial, from the same noise each time, while `model` is perturbed."""
    for trial in trials:
        with perturbed(model, layers, trial.method, trial.distance, num_blocks=trial.num_blocks, seed=seed, k=trial.k):
            yield trial, sample()


def pixel_distance(images: Images, others: Images) -> float:
    """Root mean square difference between the pixels of images, from 0 to 1."""
    squares = [
        np.square((np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)) / 255).mean()
        for one, other in zip(images, others, strict=True)
    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def scores(
    images: Images, unperturbed: Images, scorers: Scorers | None, wanted: Sequence[Named]
) -> Mapping[str, float]:
    """Scores of perturbed images against the base's own; without the miniature's scorers `pixels` only.

    Returns:
        `pixels`: as `pixel_distance`. And `class`, `colour`, `setting`: as `tinyworld.figures.recognised`;
        `recognised`: their mean; `likeness`: the mean cosine similarity of CLIP's features to the base's images.
    """
    found = {"pixels": pixel_distance(images, unperturbed)}
    if scorers is None:
        return found
    shares = {"class": math.nan, "colour": math.nan, "setting": math.nan} | recognised(scorers, images, wanted)
    known = [share for share in shares.values() if not math.isnan(share)]
    cosines = (scorers.image_features(images) * scorers.image_features(unperturbed)).sum(dim=1)
    return {**found, **shares, "recognised": math.fsum(known) / len(known), "likeness": float(cosines.mean())}

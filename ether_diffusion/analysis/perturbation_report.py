"""A frozen base under random transforms: images, scores as a table and a plot, and the command (paper, Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.adapters.targets import check_targets, target_modules
from ether_diffusion.ether import EtherConfig
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import TINY
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.figures import GUIDANCE, fresh_scenes, named
from ether_diffusion.tinyworld.scoring import load_scorers

from . import plots
from .output import check_matplotlib, plot, write_command, write_table
from .sweep import plan, scores, sweep

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

    Args:
        command: Goes into `command.txt` and the plots' metadata.

    Returns:
        The rows of `perturbation.csv`; the first is the base's as it is.

    Raises:
        UserError: as `load_pipeline`, `check_targets` and `plan`; or matplotlib is missing. Nothing is written then.
    """
    check_matplotlib()
    if settings.prompts is None:
        scenes, prompts = fresh_scenes(settings.count, "train")
        wanted = [named(scene, text) for scene, text in zip(scenes, prompts, strict=True)]
        scorers = load_scorers()
    else:
        prompts, wanted, scorers = settings.prompts, [], None
    pipeline, _ = load_pipeline(base_model=settings.base_model, device=settings.device)
    target = settings.target[0] if len(settings.target) == 1 else list(settings.target)
    layers = check_targets(pipeline.unet, EtherConfig(target_modules=target_modules(target)), target)
    options = {"draws": settings.draws, "num_blocks": settings.num_blocks}
    trials = plan(pipeline.unet, layers, settings.methods, settings.distances, **options)
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
        for trial, found in sweep(pipeline.unet, layers, trials, images, settings.seed):
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

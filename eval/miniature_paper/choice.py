"""Which learning rate is each method's best in the miniature paper, and by what number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ether_diffusion.benchmark.grid import Summary, grid_part, read_grid
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results

from .config import RATE, PaperConfig

LIKENESS, FAITHFULNESS, MAPS = "backbone", "CLIP-T", "mIoU"
"""The metrics that decide: of subjects the first two, of maps the third."""


@dataclass(frozen=True)
class Chosen:
    """A method's best point of the grid.

    Attributes:
        score: What it was chosen by.
        at_edge: The rate is the lowest or the highest that was tried: a better one may lie beyond.
    """

    cell: Cell
    rate: float | None
    score: float
    at_edge: bool


def fidelity(likeness: float, ceiling: float, faithfulness: float, untrained: float) -> float:
    """One number for subject and prompt: the harmonic mean of two shares of what can be had.

    Args:
        likeness, ceiling: Of the images to the photos, and of the photos to one another.
        faithfulness, untrained: Of the images to their prompts, and of the untrained base's.

    Returns:
        0 where the images are no likeness or follow no prompt; 1 where they do as well as photos and base.
    """
    shares = [max(likeness / ceiling, 0.0), max(faithfulness / untrained, 0.0)]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def choose_rates(config: PaperConfig) -> dict[str, dict[str, Chosen]]:
    """Each method's best point of the grid, by task: of subjects by `fidelity`, of maps by mIoU.

    Methods of which nothing is scored are left out.
    """
    grid = config.rates()
    scored = {
        "dreambooth": _subject_scores(config, grid),
        "controllable": [(one, one.values[MAPS].mean) for one in read_grid(grid, "controllable") if _final(one)],
    }
    return {task: _best(found, grid_part(grid, task).grid.seeds[0]) for task, found in scored.items()}


def choose_refits(grid: GridConfig | None) -> dict[str, Chosen]:
    """The same of the second phases."""
    if grid is None:
        return {}
    found = [(one, one.values[MAPS].mean) for one in read_grid(grid, "controllable") if _final(one)]
    return _best(found, grid_part(grid, "controllable").grid.seeds[0])


def _final(one: Summary) -> bool:
    return one.step is None and one.scored > 0


def _subject_scores(config: PaperConfig, grid: GridConfig) -> list[tuple[Summary, float]]:
    plan = Plan(grid.benchmark())
    found = [one for one in read_grid(grid, "dreambooth") if _final(one)]
    untrained = next((one.values[FAITHFULNESS].mean for one in found if one.method == config.dreambooth.base), math.nan)
    seed, scored = config.dreambooth.grid.seeds[0], []
    for one in found:
        file = plan.folder("dreambooth", Cell(one.method, one.point, seed).name) / RESULTS
        ceiling = Results.read(file).ceilings[LIKENESS]
        values = (one.values[LIKENESS].mean, ceiling, one.values[FAITHFULNESS].mean, untrained)
        scored.append((one, fidelity(*values)))
    return scored


def _best(scored: Sequence[tuple[Summary, float]], seed: int) -> dict[str, Chosen]:
    chosen = {}
    for method in dict.fromkeys(one.method for one, _ in scored):
        own = [(one, score) for one, score in scored if one.method == method]
        # Of equal ones the first, which the grid lists at the lowest rate.
        best, score = max(own, key=lambda pair: pair[1])
        rate = best.at(RATE)
        rates = [float(value) for one, _ in own if (value := one.at(RATE)) is not None]
        edge = rate is not None and float(rate) in (min(rates), max(rates))
        chosen[method] = Chosen(Cell(method, best.point, seed), None if rate is None else float(rate), score, edge)
    return chosen

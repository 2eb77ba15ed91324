"""The best learning rate of each method in the miniature paper, and the number that chooses it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ether_diffusion.benchmark.grid import Summary, grid_part, read_grid
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results

from .config import RATE, PaperConfig

SUBJECT, PROMPT, MAPS = "backbone", "CLIP-T", "mIoU"
"""The metrics that choose: subject and prompt fidelity, and agreement with maps."""


@dataclass(frozen=True)
class Chosen:
    """A method's best point of the grid.

    Attributes:
        score: The number that chose it.
        at_edge: The rate is the lowest or the highest of the grid: a better one may be outside.
    """

    cell: Cell
    rate: float | None
    score: float
    at_edge: bool


def fidelity(subject: float, ceiling: float, prompt: float, untrained: float) -> float:
    """One number for subject and prompt fidelity: the harmonic mean of two shares of the best that can be expected.

    Args:
        subject, ceiling: Similarity of the images to the photos, and of the photos to one another.
        prompt, untrained: Similarity of the images to their prompts: of the run's, and of the untrained base's.

    Returns:
        0 if the images do not resemble the subject or do not follow prompts; 1 if they do as well as photos and base.
    """
    shares = [max(subject / ceiling, 0.0), max(prompt / untrained, 0.0)]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def choose_rates(config: PaperConfig) -> dict[str, dict[str, Chosen]]:
    """Each method's best point of the grid, by task: for subjects by `fidelity`, for maps by mIoU.

    Methods without scores are left out.
    """
    grid = config.rates()
    scored = {
        "dreambooth": _subject_scores(config, grid),
        "controllable": [(one, one.values[MAPS].mean) for one in read_grid(grid, "controllable") if _final(one)],
    }
    return {task: _best(found, grid_part(grid, task).grid.seeds[0]) for task, found in scored.items()}


def choose_refits(grid: GridConfig | None) -> dict[str, Chosen]:
    """The best points of the second phases, by mIoU."""
    if grid is None:
        return {}
    found = [(one, one.values[MAPS].mean) for one in read_grid(grid, "controllable") if _final(one)]
    return _best(found, grid_part(grid, "controllable").grid.seeds[0])


def cells_of(chosen: Mapping[str, Mapping[str, Chosen]]) -> dict[str, dict[str, Cell]]:
    """The points themselves, by task and method."""
    return {task: {name: one.cell for name, one in found.items()} for task, found in chosen.items()}


def _final(one: Summary) -> bool:
    return one.step is None and one.scored > 0


def _subject_scores(config: PaperConfig, grid: GridConfig) -> list[tuple[Summary, float]]:
    plan = Plan(grid.benchmark())
    found = [one for one in read_grid(grid, "dreambooth") if _final(one)]
    untrained = next((one.values[PROMPT].mean for one in found if one.method == config.dreambooth.base), math.nan)
    seed, scored = config.dreambooth.grid.seeds[0], []
    for one in found:
        file = plan.folder("dreambooth", Cell(one.method, one.point, seed).name) / RESULTS
        ceiling = Results.read(file).ceilings[SUBJECT]
        values = (one.values[SUBJECT].mean, ceiling, one.values[PROMPT].mean, untrained)
        scored.append((one, fidelity(*values)))
    return scored


def _best(scored: Sequence[tuple[Summary, float]], seed: int) -> dict[str, Chosen]:
    chosen = {}
    for method in dict.fromkeys(one.method for one, _ in scored):
        own = [(one, score) for one, score in scored if one.method == method]
        # Of equal scores the first, which has the lowest rate in the grid's order.
        best, score = max(own, key=lambda pair: pair[1])
        rate = best.at(RATE)
        rates = [float(value) for one, _ in own if (value := one.at(RATE)) is not None]
        edge = rate is not None and float(rate) in (min(rates), max(rates))
        chosen[method] = Chosen(Cell(method, best.point, seed), None if rate is None else float(rate), score, edge)
    return chosen

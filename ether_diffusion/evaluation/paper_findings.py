"""What the miniature paper found: best rates, tables, curves and analyses, read from where the runs lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.generation import read_run

from .averages import clusters_of, interval
from .benchmark import is_scored
from .benchmark_config import Unit
from .benchmark_plan import Plan
from .benchmark_scores import read_scores
from .benchmark_worker import scores_file
from .grid import Summary, grid_part, read_grid
from .grid_config import Cell, GridConfig
from .paper_analyses import NO_CHANGE, read_analysis
from .paper_config import RATE, PaperConfig
from .protocols import SubjectProtocol
from .results import FILE as RESULTS
from .results import Results

LIKENESS, FAITHFULNESS, MAPS = "backbone", "CLIP-T", "mIoU"
"""The metrics that decide: of subjects the first two, of maps the third."""


@dataclass(frozen=True)
class Difference:
    """How much higher one method's metric is than another's, and the interval of that."""

    value: float
    low: float
    high: float


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


@dataclass(frozen=True)
class Scores:
    """A table: results by method, and the differences between methods.

    Attributes:
        parameters: What was trained, beside the condition encoder.
        differences: By metric and the pair's names.
    """

    results: Mapping[str, Results]
    parameters: Mapping[str, int]
    differences: Mapping[tuple[str, str, str], Difference] = field(default_factory=dict)

    def value(self, method: str, metric: str) -> float:
        """nan where it was not measured."""
        found = self.results.get(method)
        return found.metrics[metric].value if found else math.nan

    def difference(self, metric: str, one: str, other: str) -> Difference | None:
        """None where one of them was not measured."""
        return self.differences.get((metric, one, other))


@dataclass(frozen=True)
class Findings:
    """Everything that the claims are decided by.

    Attributes:
        grids: By task, the grid's points; second phases among those of the maps.
        chosen: By task and method.
        distances: By method and rate, of the grid's subject: `transform` and `weight`.
        energies: By method and step.
        perturbed: By kind and distance, CLIP-T.
    """

    subjects: Scores
    maps: Scores
    grids: Mapping[str, Sequence[Summary]]
    chosen: Mapping[str, Mapping[str, Chosen]]
    distances: Mapping[str, Mapping[float, Mapping[str, Any]]]
    energies: Mapping[str, Mapping[int, float]]
    perturbed: Mapping[str, Mapping[float, float]]


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


def read_findings(config: PaperConfig, refits: GridConfig | None) -> Findings:
    """All of it, as far as it is done."""
    chosen = choose_rates(config)
    chosen["controllable"] |= choose_refits(refits)
    plan = Plan(
        config.tables({task: {name: one.cell for name, one in found.items()} for task, found in chosen.items()})
    )
    grid = config.rates()
    grids = {task: list(read_grid(grid, task)) for task in ("dreambooth", "controllable")}
    if refits is not None:
        grids["controllable"] += read_grid(refits, "controllable")
    distances: dict[str, dict[float, Mapping[str, Any]]] = {}
    for cell in config.dreambooth.cells():
        found = read_analysis(distance_file(config, cell))
        if found is not None:
            distances.setdefault(cell.method, {})[float(dict(cell.point)[RATE])] = found
    energies = {}
    for method in config.dreambooth.methods:
        found = read_analysis(energy_file(config, method))
        if found is not None:
            energies[method] = {int(step): value for step, value in found["changes"].items()}
    perturbed: dict[str, dict[float, float]] = {}
    for kind, distance in perturbations(config):
        found = read_analysis(perturbation_file(config, kind, distance))
        if found is not None:
            perturbed.setdefault(kind, {})[distance] = found["clip_t"]
    return Findings(_subject_table(plan), _map_table(plan), grids, chosen, distances, energies, perturbed)


def perturbations(config: PaperConfig) -> list[tuple[str, float]]:
    """The base as it is, then all kinds and distances."""
    stated = config.perturbations.distances.items()
    return [(NO_CHANGE, 0.0), *((kind, distance) for kind, distances in stated for distance in distances)]


def steps_of(config: PaperConfig, task: str) -> int | None:
    """Of every training of a task, but of those with fewer of their own, such as that of the base; None: epochs."""
    plan = Plan(config.rates().benchmark())
    steps = [plan.training(unit).training.steps for unit in plan.units() if unit.task == task]
    return max((step for step in steps if step is not None), default=None)


def distance_file(config: PaperConfig, cell: Cell) -> Path:
    return config.output_dir / "analyses" / "distances" / f"{cell.name}.json"


def energy_file(config: PaperConfig, method: str) -> Path:
    return config.output_dir / "analyses" / "energy" / f"{method}.json"


def perturbation_file(config: PaperConfig, kind: str, distance: float) -> Path:
    return config.output_dir / "analyses" / "perturbation" / f"{kind}-{distance:g}.json"


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


def _subject_table(plan: Plan) -> Scores:
    part, protocol = plan.part("dreambooth")
    assert isinstance(protocol, SubjectProtocol)
    units = {method: [Unit("dreambooth", method, name) for name in plan.names()] for method in part.methods}
    done = {method: found for method, found in units.items() if all(is_scored(plan, unit) for unit in found)}
    results = {method: Results.read(plan.folder("dreambooth", method) / RESULTS) for method in done}
    parameters = {method: _parameters(plan.run_folder(found[0])) for method, found in done.items()}
    means: dict[str, dict[str, dict[str, dict[str, float]]]] = {}  # by method, metric, subject and prompt
    for method, found in done.items():
        for unit in found:
            scores = read_scores(scores_file(plan, unit)).scores
            for metric, pairs in scores.pairs.items():
                clusters = clusters_of(pairs, scores.prompt_of)
                own = {prompt: total / count for prompt, (total, count) in clusters.items()}
                means.setdefault(method, {}).setdefault(metric, {})[scores.subject] = own
    differences = {}
    for one in done:
        for other in done:
            for metric in protocol.metrics if one != other else ():
                pair = means[one][metric], means[other][metric]
                paired = {
                    subject: {p: (pair[0][subject][p] - pair[1][subject][p], 1) for p in pair[0][subject]}
                    for subject in pair[0]
                }
                value = results[one].metrics[metric].value - results[other].metrics[metric].value
                low, high = interval(paired, "macro", protocol.bootstrap)
                differences[metric, one, other] = Difference(value, low, high)
    return Scores(results, parameters, differences)


def _map_table(plan: Plan) -> Scores:
    part, protocol = plan.part("controllable")
    done = [method for method in part.methods if is_scored(plan, Unit("controllable", method))]
    results = {method: Results.read(plan.folder("controllable", method) / RESULTS) for method in done}
    parameters = {method: _parameters(plan.run_folder(Unit("controllable", method))) for method in done}
    differences = {}
    for one in done:
        for other in done:
            for metric in protocol.metrics if one != other else ():
                a, b = results[one].metrics[metric], results[other].metrics[metric]
                value = a.value - b.value
                # As if the two had been drawn under different maps: somewhat too wide.
                low = value - math.hypot(a.value - a.low, b.high - b.value)
                high = value + math.hypot(a.high - a.value, b.value - b.low)
                differences[metric, one, other] = Difference(value, low, high)
    return Scores(results, parameters, differences)


def _parameters(run: Path) -> int:
    saved = read_run(run).adapter
    return saved.parameters if saved is not None else 0

"""The results of the miniature paper: best rates, tables, curves and analyses, read from the output folder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import Summary, divergence, read_grid
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.runner import is_scored
from ether_diffusion.evaluation.intervals import Estimate, Interval
from ether_diffusion.evaluation.protocols import SubjectProtocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.generation import read_run

from .analyses import NO_CHANGE, read_analysis
from .best_rates import Chosen, cells_of, choose_rates, choose_refits
from .config import RATE, PaperConfig
from .gains import MapTraining, best_of, map_estimates, over_subjects, read_trainings


@dataclass(frozen=True)
class Scores:
    """A table: results by method, and the differences between methods.

    Attributes:
        parameters: Number of trained parameters, without the condition encoder.
        differences: By metric and the two methods' names.
        diverged: Trainings that diverged; their methods have no row.
    """

    results: Mapping[str, Results]
    parameters: Mapping[str, int]
    differences: Mapping[tuple[str, str, str], Interval] = field(default_factory=dict)
    diverged: tuple[Unit, ...] = ()

    def value(self, method: str, metric: str) -> float:
        """The value of a metric; nan if it was not measured."""
        found = self.results.get(method)
        return found.metrics[metric].value if found else math.nan

    def difference(self, metric: str, one: str, other: str) -> Interval | None:
        """How much higher `one` is than `other`; None if one of them was not measured."""
        return self.differences.get((metric, one, other))


@dataclass(frozen=True)
class Findings:
    """All numbers that decide claims.

    Attributes:
        grids: The grid's points by task; second phases are among those of maps.
        chosen: The best points, by task and method.
        distances: Of the grid's subject, by method and rate: `transform` and `weight`.
        energies: Changes of energy, by method and step.
        perturbed: CLIP-T by kind of perturbation and distance.
        trainings: The grid's trainings on maps, by method.
        map_steps: The number of steps of each of these trainings.
    """

    subjects: Scores
    maps: Scores
    grids: Mapping[str, Sequence[Summary]]
    chosen: Mapping[str, Mapping[str, Chosen]]
    distances: Mapping[str, Mapping[float, Mapping[str, Any]]]
    energies: Mapping[str, Mapping[int, float]]
    perturbed: Mapping[str, Mapping[float, float]]
    trainings: Mapping[str, Sequence[MapTraining]] = field(default_factory=dict)
    map_steps: int | None = None

    @property
    def alone(self) -> Estimate | None:
        """mIoU of the encoder alone, on the scenes of `trainings`."""
        best = best_of(self.trainings.get("none", ()))
        return None if best is None else best.end


def read_findings(config: PaperConfig, refits: GridConfig | None) -> Findings:
    """Read all results that there are."""
    chosen = choose_rates(config)
    chosen["controllable"] |= choose_refits(refits)
    plan = Plan(config.tables(cells_of(chosen)))
    grid = config.rates()
    grids = {task: list(read_grid(grid, task)) for task in ("dreambooth", "controllable")}
    if refits is not None:
        grids["controllable"] += read_grid(refits, "controllable")
    distances: dict[str, dict[float, Mapping[str, Any]]] = {}
    for cell in config.dreambooth.cells():
        if found := read_analysis(distance_file(config, cell)):
            distances.setdefault(cell.method, {})[float(dict(cell.point)[RATE])] = found
    energies = {
        method: {int(step): value for step, value in found["changes"].items()}
        for method in config.dreambooth.methods
        if (found := read_analysis(energy_file(config, method)))
    }
    perturbed: dict[str, dict[float, float]] = {}
    for kind, distance in perturbations(config):
        if found := read_analysis(perturbation_file(config, kind, distance)):
            perturbed.setdefault(kind, {})[distance] = found["clip_t"]
    tables, trainings = (_subject_table(plan), _map_table(plan)), read_trainings(grid)
    steps = steps_of(config, "controllable")
    return Findings(*tables, grids, chosen, distances, energies, perturbed, trainings, steps)


def perturbations(config: PaperConfig) -> list[tuple[str, float]]:
    """Kinds and distances: first the base without a perturbation, then all of the config."""
    stated = config.perturbations.distances.items()
    return [(NO_CHANGE, 0.0), *((kind, distance) for kind, distances in stated for distance in distances)]


def steps_of(config: PaperConfig, task: str) -> int | None:
    """The number of steps of a task's trainings, without shorter ones such as the base's; None: they count epochs."""
    plan = Plan(config.rates().benchmark())
    steps = [plan.training(unit).training.steps for unit in plan.units() if unit.task == task]
    return max((step for step in steps if step is not None), default=None)


def distance_file(config: PaperConfig, cell: Cell) -> Path:
    return config.output_dir / "analyses" / "distances" / f"{cell.name}.json"


def energy_file(config: PaperConfig, method: str) -> Path:
    return config.output_dir / "analyses" / "energy" / f"{method}.json"


def perturbation_file(config: PaperConfig, kind: str, distance: float) -> Path:
    return config.output_dir / "analyses" / "perturbation" / f"{kind}-{distance:g}.json"


def _subject_table(plan: Plan) -> Scores:
    part, protocol = plan.part("dreambooth")
    assert isinstance(protocol, SubjectProtocol)
    units = {method: [Unit("dreambooth", method, name) for name in plan.names()] for method in part.methods}
    done = {method: found for method, found in units.items() if all(is_scored(plan, unit) for unit in found)}
    results = {method: Results.read(plan.folder("dreambooth", method) / RESULTS) for method in done}
    parameters = {method: _parameters(plan.run_folder(found[0])) for method, found in done.items()}
    differences = {}
    for one, other in itertools.permutations(done, 2):
        for metric in protocol.metrics:
            pair = results[one].metrics[metric].per_subject, results[other].metrics[metric].per_subject
            differences[metric, one, other] = over_subjects(*pair, protocol.bootstrap.level)
    return Scores(results, parameters, differences, _diverged(plan, "dreambooth"))


def _map_table(plan: Plan) -> Scores:
    part = plan.part("controllable")[0]
    done = [method for method in part.methods if is_scored(plan, Unit("controllable", method))]
    results = {method: Results.read(plan.folder("controllable", method) / RESULTS) for method in done}
    parameters = {method: _parameters(plan.run_folder(Unit("controllable", method))) for method in done}
    estimates = {method: map_estimates(plan, Unit("controllable", method)) for method in done}
    differences = {
        (metric, one, other): (estimates[one][metric] - estimates[other][metric]).interval()
        for one, other in itertools.permutations(done, 2)
        for metric in estimates[one]
    }
    return Scores(results, parameters, differences, _diverged(plan, "controllable"))


def _diverged(plan: Plan, task: str) -> tuple[Unit, ...]:
    return tuple(unit for unit in plan.units() if unit.task == task and divergence(plan.config, unit))


def _parameters(run: Path) -> int:
    saved = read_run(run).adapter
    return saved.parameters if saved is not None else 0

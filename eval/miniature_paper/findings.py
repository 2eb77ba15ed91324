"""What the miniature paper found: best rates, tables, curves and analyses, read from where the runs lie."""

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
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.generation import read_run

from .analyses import NO_CHANGE, read_analysis
from .choice import Chosen, choose_rates, choose_refits
from .config import RATE, PaperConfig
from .counts import read_counts
from .curves import MapTraining, best_of, counts_file, read_trainings
from .estimates import Difference, Estimate, map_estimates, over_subjects


@dataclass(frozen=True)
class Scores:
    """A table: results by method, and the differences between methods.

    Attributes:
        parameters: What was trained, beside the condition encoder.
        differences: By metric and the pair's names.
        diverged: Trainings that came to nothing, without which a method has no row.
    """

    results: Mapping[str, Results]
    parameters: Mapping[str, int]
    differences: Mapping[tuple[str, str, str], Difference] = field(default_factory=dict)
    diverged: tuple[Unit, ...] = ()

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
        trainings: By method, of the grid of maps.
        map_steps: Of each of these trainings.
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
        """mIoU of the encoder alone, where `trainings` are scored."""
        best = best_of(self.trainings.get("none", ()))
        return None if best is None else best.end


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
    return Findings(
        _subject_table(plan),
        _map_table(config, plan),
        grids,
        chosen,
        distances,
        energies,
        perturbed,
        read_trainings(config, grid),
        steps_of(config, "controllable"),
    )


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


def _map_table(config: PaperConfig, plan: Plan) -> Scores:
    part, protocol = plan.part("controllable")
    assert isinstance(protocol, MapProtocol)
    done = [method for method in part.methods if is_scored(plan, Unit("controllable", method))]
    results = {method: Results.read(plan.folder("controllable", method) / RESULTS) for method in done}
    parameters = {method: _parameters(plan.run_folder(Unit("controllable", method))) for method in done}
    estimates: dict[str, dict[str, Estimate]] = {}
    for method in done:
        counts = read_counts(counts_file(config, "tables", Unit("controllable", method))) or {}
        seen = {name: map_estimates(found, protocol.bootstrap) for name, found in counts.items()}
        estimates[method] = {
            name: seen[metric.judge][metric.value]
            for name, metric in protocol.metrics.items()
            if metric.kind == "segmentation" and metric.judge in seen
        }
    differences = {
        (metric, one, other): (estimates[one][metric] - estimates[other][metric]).interval()
        for one, other in itertools.permutations(done, 2)
        for metric in estimates[one].keys() & estimates[other].keys()
    }
    return Scores(results, parameters, differences, _diverged(plan, "controllable"))


def _diverged(plan: Plan, task: str) -> tuple[Unit, ...]:
    return tuple(unit for unit in plan.units() if unit.task == task and divergence(plan.config, unit))


def _parameters(run: Path) -> int:
    saved = read_run(run).adapter
    return saved.parameters if saved is not None else 0

"""The benchmark runner: for each method and subject train, draw, score; then a table over the methods.

What is done is not done again: a run that stopped goes on with the same command. Units do not depend on one another,
so that any number of workers, on any number of machines that see one folder, give the same images and numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ether_diffusion.config import to_yaml
from ether_diffusion.errors import TrainingFailed
from ether_diffusion.evaluation.comparison import check_comparable, comparison
from ether_diffusion.evaluation.protocols import SubjectProtocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results, aligned
from ether_diffusion.files import write_whole
from ether_diffusion.report.page import write_report

from .config import WHOLE, BenchmarkConfig, Shard, Unit
from .plan import Plan
from .score_files import average_scores, read_scores
from .stages import Stages, locked
from .worker import DIVERGED, DRAWN, SCORED, TRAINED, Worker, sampling_settings, scores_file, stages_file

Executor = Callable[[BenchmarkConfig, Sequence[Unit]], dict[Unit, str]]
"""Does units and tells why some failed."""


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to.

    Attributes:
        tables: For a terminal, by task, over the methods that are complete.
        waiting: Units that are not scored yet: other shards' share, or failed.
        failed: Why, by unit.
        files: What was written for all to read.
    """

    tables: dict[str, str] = field(default_factory=dict)
    waiting: tuple[Unit, ...] = ()
    failed: dict[Unit, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def run_benchmark(config: BenchmarkConfig, shard: Shard = WHOLE, executor: Executor | None = None) -> Outcome:
    """Do a shard's units, and write the tables over all methods whose units are done, whoever did them.

    Args:
        executor: Default: one unit after another in this process.

    Raises:
        UserError: something is the user's to mend; nothing has been trained if that could be told before.
        Interrupted: a signal came while training; a checkpoint was written.
    """
    plan = Plan(config)
    plan.check()
    mine = shard.of(plan.units())
    with tables_lock(config):
        write_whole(config.output_dir / "benchmark.yaml", to_yaml(config))
    failed = (executor or one_by_one)(config, mine)
    with tables_lock(config):
        return collect(config, failed)


def one_by_one(config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
    """One unit after another, here. A training that fails leaves the others going."""
    worker, failed = Worker(config), {}
    for number, unit in enumerate(units, 1):
        print(f"[{number}/{len(units)}] {unit}", flush=True)
        try:
            worker.do(unit)
        except TrainingFailed as error:
            failed[unit] = str(error)
            print(f"{unit}: {error}", flush=True)
    return failed


def collect(config: BenchmarkConfig, failed: dict[Unit, str] | None = None) -> Outcome:
    """Average what is scored, and write `results.json` of each method that is complete and the tables of each task.

    Raises:
        UserError: results that cannot be compared.
    """
    plan = Plan(config)
    waiting = tuple(unit for unit in plan.units() if not all(is_scored(plan, one) for one in plan.readings(unit)))
    tables: dict[str, str] = {}
    files: list[Path] = []
    for task in plan.tasks:
        part, _ = plan.part(task)
        complete = [
            method for method in part.methods if not any((unit.task, unit.method) == (task, method) for unit in waiting)
        ]
        for method, step in itertools.product(complete, part.also_checkpoints):
            _results(plan, task, method, step)
        results = {method: _results(plan, task, method) for method in complete}
        if not results:
            continue
        check_comparable(results)
        tables[task] = comparison(results)
        outputs = [config.output_dir / task / f"table{suffix}" for suffix in (".md", ".csv")]
        # These files alone: below a method's folder may lie results of its checkpoints, and by other protocols.
        averaged = [plan.folder(task, method) / RESULTS for method in results]
        files += [*averaged, *write_report(averaged, outputs)]
    return Outcome(tables, waiting, failed or {}, tuple(files))


def progress(config: BenchmarkConfig) -> str:
    """How many units of each method are trained, and drawn and scored by the protocol as it is, further checkpoints
    included: a table for a terminal."""
    plan = Plan(config)
    rows: list[tuple[str, ...]] = [("", "units", "trained", "drawn", "scored")]
    for task in plan.tasks:
        for method in plan.part(task)[0].methods:
            units = [unit for unit in plan.units() if (unit.task, unit.method) == (task, method)]
            trained = sum(is_trained(plan, unit) for unit in units)
            drawn, scored = (
                sum(all(done(plan, reading) for reading in plan.readings(unit)) for unit in units)
                for done in (is_generated, is_scored)
            )
            rows.append((f"{task}/{method}", *map(str, (len(units), trained, drawn, scored))))
    return aligned(rows)


def is_trained(plan: Plan, unit: Unit) -> bool:
    """Whether the training of a unit came to weights."""
    return DIVERGED not in (Stages(stages_file(plan, unit)).outputs(TRAINED) or {DIVERGED: ""})


def is_generated(plan: Plan, unit: Unit) -> bool:
    """Whether the images of a unit, or of a reading of it, are drawn as the protocol says."""
    return _is_done(plan, unit, DRAWN, sampling_settings(plan.part(unit.task)[1]))


def is_scored(plan: Plan, unit: Unit) -> bool:
    """Whether a unit, or a reading of it, is done, by the protocol as it is."""
    digest = plan.part(unit.task)[1].digest
    return _is_done(plan, unit, SCORED, {"protocol": digest}) and scores_file(plan, unit).is_file()


def _is_done(plan: Plan, unit: Unit, stage: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a stage came to its end, with these among its inputs."""
    found: Any = Stages(stages_file(plan, unit)).found.get(stage)
    return (
        found is not None
        and found["outputs"] is not None
        and all(found["inputs"].get(key) == value for key, value in wanted.items())
    )


def _results(plan: Plan, task: str, method: str, step: int | None = None) -> Results:
    _, protocol = plan.part(task)
    path = plan.folder(task, method, step) / RESULTS
    if not isinstance(protocol, SubjectProtocol):
        return Results.read(path)
    units = [Unit(task, method, name, step) for name in plan.names()]
    results = average_scores(protocol, [read_scores(scores_file(plan, unit)) for unit in units])
    results.save(path)
    return results


def tables_lock(config: BenchmarkConfig) -> FileLock:
    """For who writes over all units: one at a time, of all that see the folder."""
    return locked(config.output_dir, "tables")

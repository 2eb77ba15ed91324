"""The benchmark runner: for each method and subject train, generate and score; then a table over the methods.

The same command resumes a run that was stopped, and repeats nothing. Units do not depend on one another, so any number
of workers, on any number of machines that see one folder, gives the same images and numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from ether_diffusion.config import to_yaml
from ether_diffusion.evaluation.comparison import check_comparable, comparison
from ether_diffusion.evaluation.protocols import SubjectProtocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results, aligned
from ether_diffusion.files import check_can_write
from ether_diffusion.own_files import check_own, write_own
from ether_diffusion.report.page import write_report

from .config import BenchmarkConfig, Unit
from .executors import Executor, InProcess
from .plan import Plan, sampling_settings
from .score_files import average_scores, read_scores
from .stages import DRAWN, SCORED, TRAINED, locked


@dataclass(frozen=True)
class Outcome:
    """The result of a benchmark.

    Attributes:
        tables: For a terminal, by task, over the methods that are complete.
        waiting: Units that are not scored yet: of other shards, or failed.
        failed: Why, by unit.
        files: The results and tables that were written.
    """

    tables: dict[str, str] = field(default_factory=dict)
    waiting: tuple[Unit, ...] = ()
    failed: dict[Unit, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def run_benchmark(config: BenchmarkConfig, executor: Executor | None = None) -> Outcome:
    """Do the units, and write the tables over all methods whose units are done, whoever did them.

    Args:
        executor: Default: one unit after another in this process.

    Raises:
        UserError: something in the settings, the data or the machine needs to be changed. Faults that can be found
            before the first training are, and then nothing is written.
        Interrupted: a signal came in a training; a checkpoint was written.
    """
    plan, executor = Plan(config), executor or InProcess()
    check_can_write(config.output_dir)
    executor.check(plan)
    plan.check()
    tables = [file for task in plan.tasks for file in table_files(config, task)]
    check_own(config.output_dir / "benchmark.yaml", *tables)
    with tables_lock(config):
        write_own(config.output_dir / "benchmark.yaml", to_yaml(config))
    failed = executor.run(config, plan.units())
    with tables_lock(config):
        return collect(config, failed)


def collect(config: BenchmarkConfig, failed: dict[Unit, str] | None = None) -> Outcome:
    """Average the scores; write `results.json` of each method that is complete, and the tables of each task.

    Raises:
        UserError: results that cannot be compared.
    """
    plan = Plan(config)
    waiting = tuple(unit for unit in plan.units() if not all(is_scored(plan, one) for one in plan.readings(unit)))
    incomplete = {(unit.task, unit.method) for unit in waiting}
    tables: dict[str, str] = {}
    files: list[Path] = []
    for task in plan.tasks:
        part, _ = plan.part(task)
        complete = [method for method in part.methods if (task, method) not in incomplete]
        for method, step in itertools.product(complete, part.also_checkpoints):
            _results(plan, task, method, step)
        results = {method: _results(plan, task, method) for method in complete}
        if not results:
            continue
        check_comparable(results)
        tables[task] = comparison(results)
        # Only these files: a method's folder may also hold results of its checkpoints, and by other protocols.
        averaged = [plan.folder(task, method) / RESULTS for method in results]
        files += [*averaged, *write_report(averaged, table_files(config, task))]
    return Outcome(tables, waiting, failed or {}, tuple(files))


def table_files(config: BenchmarkConfig, task: str) -> list[Path]:
    """The tables over a task's methods."""
    return [config.output_dir / task / f"table{suffix}" for suffix in (".md", ".csv")]


def progress(config: BenchmarkConfig) -> str:
    """A table for a terminal: how many units of each method are trained, generated and scored.

    Images and scores count if they are those of the protocol as it is, further checkpoints included.
    """
    plan = Plan(config)
    by_method: dict[str, list[Unit]] = {}
    for unit in plan.units():
        by_method.setdefault(f"{unit.task}/{unit.method}", []).append(unit)
    rows: list[tuple[str, ...]] = [("", "units", "trained", "generated", "scored")]
    for name, units in by_method.items():
        trained = sum(is_trained(plan, unit) for unit in units)
        generated, scored = (
            sum(all(done(plan, reading) for reading in plan.readings(unit)) for unit in units)
            for done in (is_generated, is_scored)
        )
        rows.append((name, *map(str, (len(units), trained, generated, scored))))
    return aligned(rows)


def is_trained(plan: Plan, unit: Unit) -> bool:
    """Whether the training of a unit ended with weights."""
    stages = plan.stages(unit)
    return stages.outputs(TRAINED) is not None and stages.divergence() is None


def is_generated(plan: Plan, unit: Unit) -> bool:
    """Whether the images of a unit, or of a reading of it, are complete and made with the protocol's settings."""
    return plan.stages(unit).outputs(DRAWN, sampling_settings(plan.part(unit.task)[1])) is not None


def is_scored(plan: Plan, unit: Unit) -> bool:
    """Whether a unit, or a reading of it, is scored by the protocol as it is."""
    wanted = {"protocol": plan.part(unit.task)[1].digest}
    return plan.stages(unit).outputs(SCORED, wanted) is not None and plan.scores_file(unit).is_file()


def _results(plan: Plan, task: str, method: str, step: int | None = None) -> Results:
    _, protocol = plan.part(task)
    path = plan.folder(task, method, step) / RESULTS
    if not isinstance(protocol, SubjectProtocol):
        return Results.read(path)
    units = [Unit(task, method, name, step) for name in plan.names()]
    results = average_scores(protocol, [read_scores(plan.scores_file(unit)) for unit in units])
    results.save(path)
    return results


def tables_lock(config: BenchmarkConfig) -> FileLock:
    """For writing over all units: one worker at a time, of all that see the folder."""
    return locked(config.output_dir, "tables")

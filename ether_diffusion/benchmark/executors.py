"""Executors: who works on a benchmark's units, one after another or many at once, here or on other machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from ether_diffusion.errors import TrainingFailed

from .config import BenchmarkConfig, Unit


class Executor(ABC):
    """Does the units that `run_benchmark` gives it; the tables are then written from the files that units leave.

    An executor gets the benchmark's config and its units in order: all methods of a subject, then of the next. It has
    `Worker(config).do(unit)` called for each, in processes that see the same files under the same paths. That call
    skips what is done, resumes what was interrupted and holds a lock on its unit. So units may be done in any order, at
    the same time, and twice, and images and numbers do not depend on the executor.

    When `run` returns, each unit is done, or among the failed, or left to another command that has the rest of the
    units (`Shard`). A training that fails (`TrainingFailed`) ends no other unit. Any other error ends the run: no
    further unit is begun, and the error is raised here, as a `UserError` if it was one. At Ctrl-C or SIGTERM trainings
    stop after a checkpoint, and `Interrupted` is raised.
    """

    @abstractmethod
    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        """Do the units.

        Returns:
            Why a unit failed, for each that did.

        Raises:
            UserError: something in the settings, the data or the machine needs to be changed.
            Interrupted: a signal came; what was done is saved.
        """


class InProcess(Executor):
    """One unit after another in this process. Scorers are loaded once."""

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        from .worker import Worker

        worker, failed = Worker(config), {}
        for number, unit in enumerate(units, 1):
            print(f"[{number}/{len(units)}] {unit}", flush=True)
            try:
                worker.do(unit)
            except TrainingFailed as error:
                failed[unit] = str(error)
                print(f"{unit}: {error}", flush=True)
        return failed


@dataclass(frozen=True)
class Shard(Executor):
    """The `number`-th of `count` shares of the units, counted from 1; commands with the other numbers do the rest."""

    number: int
    count: int
    executor: Executor = field(default_factory=InProcess)
    """Does the units of the share."""

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        return self.executor.run(config, self.of(units))

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """The units of the share, in their order.

        Methods may differ much in their time, so shares get equal numbers of units of each method, give or take one:
        every `count`-th unit of all, sorted by method.
        """
        by_method = sorted(units, key=lambda unit: (unit.task, unit.method))
        share = set(by_method[self.number - 1 :: self.count])
        return [unit for unit in units if unit in share]


@dataclass(frozen=True)
class UnitJob:
    """A unit for another process."""

    config_json: str
    """The benchmark's config."""
    unit: Unit

    def __str__(self) -> str:
        return str(self.unit)

    def do(self) -> None:
        """Do the unit. Raises as `Worker.do`."""
        from .worker import Worker

        Worker(BenchmarkConfig.model_validate_json(self.config_json)).do(self.unit)

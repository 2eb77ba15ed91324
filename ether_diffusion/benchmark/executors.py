"""Executors: who works on a benchmark's units, one after another or many at once, here or on other machines."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ether_diffusion.errors import TrainingFailed, UserError

from .config import BenchmarkConfig, Pack, Unit

if TYPE_CHECKING:
    from .plan import Plan
    from .worker import Worker

RETRIES = 3
H = TypeVar("H")


class Executor(ABC):
    """Does the units that `run_benchmark` gives it; the tables are then written from the files that units leave.

    An executor gets the benchmark's config and its units in order: all methods of a subject, then of the next. It has
    `Worker(config).do(unit)` called for each, in processes that see the same files under the same paths; before the
    units of one of the plan's packs, `train_together` of these. The calls skip what is done, resume what was
    interrupted and hold locks on their units. So units may be done in any order, at the same time, and twice, and
    images and numbers do not depend on the executor.

    When `run` returns, each unit is done, or among the failed, or left to another command that has the rest of the
    units (`Shard`). A training that fails (`TrainingFailed`) ends no other unit. Any other error ends the run: no
    further unit is begun, and the error is raised here, as a `UserError` if it was one. At Ctrl-C or SIGTERM trainings
    stop after a checkpoint, and `Interrupted` is raised.
    """

    def check(self, plan: Plan) -> None:
        """Refuse, before anything is written, devices and precisions that the workers do not have. Raises UserError."""
        from ether_diffusion.generation import pick_device

        pick_device(plan.config.device)
        if pick_device().type != "cpu":
            return
        for unit in {(unit.task, unit.method): unit for unit in plan.units()}.values():
            if plan.training(unit).training.mixed_precision == "fp16":
                where = f"{unit.task}.methods.{unit.method}"
                raise UserError(f"{where}: training.mixed_precision: fp16 needs a GPU; on a CPU take bf16 or no.")

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
        packs = {unit: pack for pack in worker.plan.untrained_packs(units) for unit in pack}
        for number, unit in enumerate(units, 1):
            print(f"[{number}/{len(units)}] {unit}", flush=True)
            if pack := packs.get(unit):
                worker.train_together(pack)
                packs = {one: other for one, other in packs.items() if other != pack}
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

    def check(self, plan: Plan) -> None:
        self.executor.check(plan)

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        from .plan import Plan

        return self.executor.run(config, self.of(units, Plan(config).packs))

    def of(self, units: Sequence[Unit], packs: Sequence[Pack] = ()) -> list[Unit]:
        """The units of the share, in their order.

        Methods may differ much in their time, so shares get equal numbers of units of each method, give or take one:
        every `count`-th unit of all, sorted by method. Packs stay whole: each goes to a share that has the fewest units
        by then, and the other units follow.
        """
        pack_of = {unit: pack for pack in packs for unit in pack}
        by_method = sorted(units, key=lambda unit: (unit.task, unit.method))
        whole = sorted(dict.fromkeys(pack_of.get(unit, (unit,)) for unit in by_method), key=len, reverse=True)
        shares: list[list[Unit]] = [[] for _ in range(self.count)]
        for pack in whole:
            min(shares, key=len).extend(pack)
        share = set(shares[self.number - 1])
        return [unit for unit in units if unit in share]


class Job(Protocol):
    """Work for a process; it can be pickled. Its `str` is its name in messages."""

    def do(self) -> None:
        """Do it, unless it is done.

        Raises:
            TrainingFailed: it cannot be done; the other jobs can.
            UserError: something in the settings, the data or the machine needs to be changed.
        """
        ...


@dataclass(frozen=True)
class UnitJob:
    """A unit as a job of another process."""

    config_json: str
    """The benchmark's config."""
    unit: Unit

    def __str__(self) -> str:
        return str(self.unit)

    def do(self) -> None:
        """Do the unit. Raises as `Worker.do`."""
        _worker(self.config_json).do(self.unit)


@dataclass(frozen=True)
class PackJob:
    """The trainings of a pack as a job of another process."""

    config_json: str
    """The benchmark's config."""
    pack: Pack

    def __str__(self) -> str:
        return f"{self.pack[0]} and {len(self.pack) - 1} more, trained together"

    def do(self) -> None:
        """Train them. Raises as `Worker.train_together`."""
        _worker(self.config_json).train_together(self.pack)


@cache
def _worker(config_json: str) -> Worker:
    """A process has one worker for all units of a benchmark, so that scorers are loaded once."""
    from .worker import Worker

    return Worker(BenchmarkConfig.model_validate_json(config_json))


def fault_of(job: Job) -> str | None:
    """Do a job. Returns why its training failed, if it did."""
    try:
        job.do()
    except TrainingFailed as error:
        return str(error)
    return None


class WorkerLost(Exception):
    """A worker is gone: killed, out of memory, or with its machine. The message is the reason."""


@dataclass
class Pool(ABC, Generic[H]):
    """Workers that do jobs; each begins the next job when it has done one. `H` stands for a job that a worker does."""

    workers: int
    """Most jobs at the same time."""
    say: Callable[[str], None] = print
    """Called with a line for each job that ended."""
    retries: int = RETRIES
    """How often a job is given to another worker after one was lost; a lost worker's checkpoints and images are
    kept."""

    @abstractmethod
    def start(self, job: Job) -> H:
        """Give a job to a worker."""

    @abstractmethod
    def wait(self, running: Collection[H]) -> H:
        """Wait until one of these has ended."""

    @abstractmethod
    def result(self, ended: H) -> str | None:
        """As `fault_of`. Raises also WorkerLost."""

    def run(
        self,
        jobs: Sequence[Job],
        title: str = "",
        after: Mapping[int, int] | None = None,
        optional: Collection[int] = (),
    ) -> dict[int, str]:
        """Do the jobs, the first ones first.

        Args:
            title: Starts each line.
            after: Jobs that build on another one, and which, by their places. They start after it, and fail with it.
            optional: Jobs that those that build on them can do without.

        Returns:
            Why a job failed, by its place. One that loses too many workers fails, too.

        Raises:
            Interrupted: a signal came; trainings in progress have written checkpoints.
            UserError: raised by a job.
        """
        after, failed, lost, ended = after or {}, {}, Counter(), 0
        waiting = deque(place for place in range(len(jobs)) if place not in after)
        running: dict[H, tuple[int, float]] = {}

        def end(place: int, fault: str | None, time_taken: str = "") -> None:
            nonlocal ended
            ended += 1
            count = f"[{ended:{len(str(len(jobs)))}}/{len(jobs)}]"
            self.say(f"{title} {count} {jobs[place]}: {fault or 'done'}{time_taken}".lstrip())
            if fault is not None:
                failed[place] = fault
            for later in [later for later, earlier in after.items() if earlier == place]:
                if fault is None or place in optional:
                    waiting.append(later)
                else:
                    end(later, f"{jobs[place]}, which it builds on, failed")

        while waiting or running:
            while waiting and len(running) < self.workers:
                place = waiting.popleft()
                running[self.start(jobs[place])] = place, time.monotonic()
            job = self.wait(running)
            place, started = running.pop(job)
            try:
                fault = self.result(job)
            except WorkerLost as error:
                lost[place] += 1
                if lost[place] <= self.retries:
                    self.say(f"{jobs[place]}: its worker was lost ({error}); try {lost[place]} of {self.retries}")
                    waiting.appendleft(place)
                    continue
                fault = f"lost {lost[place]} workers, the last one: {error}"
            end(place, fault, f" ({time.monotonic() - started:.0f} s)")
        return failed


@dataclass(frozen=True)
class PoolUnits(Executor):
    """Units as jobs of a pool."""

    pool: Pool
    title: str = ""
    after: Mapping[Unit, Unit] = field(default_factory=dict)
    """Units that build on another one, and which."""

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        from .plan import Plan

        # First packs, and units that others build on; then maps: a long job that starts last leaves other cores idle.
        waited = set(self.after.values())
        ordered = sorted(units, key=lambda unit: (unit not in waited, unit.subject is not None))
        packs = [pack for pack in Plan(config).untrained_packs(units) if not self.after.keys() & set(pack)]
        config_json = config.model_dump_json()
        jobs: list[Job] = [PackJob(config_json, pack) for pack in packs]
        places = {unit: place for place, unit in enumerate(ordered, len(packs))}
        after = {places[one]: places[other] for one, other in self.after.items() if {one, other} <= places.keys()}
        after |= {places[unit]: place for place, pack in enumerate(packs) for unit in pack}
        jobs += [UnitJob(config_json, unit) for unit in ordered]
        failed = self.pool.run(jobs, self.title, after, range(len(packs)))
        return {unit: failed[place] for unit, place in places.items() if place in failed}

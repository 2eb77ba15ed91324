"""Jobs spread over processes of one thread each, so that no core waits for another one's threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ether_diffusion.benchmark.config import BenchmarkConfig, Unit
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError


class Job(Protocol):
    """Something to do, once; it can be sent to a process."""

    def __str__(self) -> str:
        """For people."""
        ...

    def do(self) -> None:
        """What is done already is not done again.

        Raises:
            TrainingFailed: it cannot be done; the others can.
            UserError: something is the user's to mend.
        """
        ...


@dataclass(frozen=True)
class UnitJob:
    """A unit of a benchmark: train, draw, score."""

    told: str
    """The benchmark's config, as JSON."""
    unit: Unit

    def __str__(self) -> str:
        return str(self.unit)

    def do(self) -> None:
        from ether_diffusion.benchmark.worker import Worker

        Worker(BenchmarkConfig.model_validate_json(self.told)).do(self.unit)


@dataclass(frozen=True)
class Done:
    """What came of a job: why it failed, if it did, and how long it took."""

    fault: str | None
    seconds: float


class Pool:
    """Processes that do jobs, the next one as soon as one is done.

    Args:
        say: Tells of every job that is done.
    """

    def __init__(self, executor: ProcessPoolExecutor, say: Callable[[str], None]) -> None:
        self.executor, self.say = executor, say

    def run(self, jobs: Sequence[Job], title: str, after: Mapping[int, int] | None = None) -> dict[int, str]:
        """Do the jobs; those given first are begun first. Tells why some failed, by their places.

        Args:
            after: Places of jobs that wait for another one, and its place. They fail with it.

        Raises:
            Interrupted: a signal came; what was going on has been kept as far as it can be.
            UserError: a job met something that is the user's to mend; or a process was killed.
        """
        failed, count, digits = {}, 0, len(str(len(jobs)))
        after = after or {}
        running: dict[Future[Done], int] = {
            self.executor.submit(_do, job): place for place, job in enumerate(jobs) if place not in after
        }
        while running:
            ready, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                place = running.pop(future)
                try:
                    done = future.result()
                except BrokenExecutor as error:
                    raise UserError(f"A worker was lost ({error}) The same command goes on.") from None
                count += 1
                number = f"[{count:{digits}}/{len(jobs)}]"
                self.say(f"{title} {number} {jobs[place]}: {done.fault or 'done'} ({done.seconds:.0f} s)")
                waiting = [later for later, earlier in after.items() if earlier == place]
                if done.fault is None:
                    running |= {self.executor.submit(_do, jobs[later]): later for later in waiting}
                    continue
                failed[place] = done.fault
                for later in waiting:
                    count += 1
                    failed[later] = f"{jobs[place]}, which it builds on, failed"
                    self.say(f"{title} [{count:{digits}}/{len(jobs)}] {jobs[later]}: {failed[later]}")
        return failed

    def units(self, title: str, after: Mapping[Unit, Unit] | None = None) -> Callable[..., dict[Unit, str]]:
        """An executor of `run_benchmark`.

        Args:
            after: Units that build on another one, and which.
        """

        def execute(config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
            # First those that others wait for; then maps, which take long: begun last, they would leave a core waiting.
            waited = set((after or {}).values())
            ordered = sorted(units, key=lambda unit: (unit not in waited, unit.subject is not None))
            places = {unit: place for place, unit in enumerate(ordered)}
            builds = {
                places[one]: places[other] for one, other in (after or {}).items() if {one, other} <= places.keys()
            }
            told = config.model_dump_json()
            failed = self.run([UnitJob(told, unit) for unit in ordered], title, builds)
            return {ordered[place]: fault for place, fault in failed.items()}

        return execute


@contextmanager
def pool(workers: int, logs: Path, say: Callable[[str], None] = print) -> Iterator[Pool]:
    """A pool whose processes end with the block: at a signal or a fault as a training does, after a checkpoint.

    Args:
        logs: A folder: what the processes print.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments = (str(logs), os.getpid())
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they load torch
    executor = ProcessPoolExecutor(workers, context, _begin, arguments)
    try:
        yield Pool(executor, say)
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)
        if kept is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = kept


def _stop(signum: int, frame: object) -> None:
    raise Interrupted(signum, "Stopped, saved. The same command goes on.")


def _begin(logs: str, parent: int) -> None:
    """In each process: its output into a file, and an end with the parent."""
    log = os.open(f"{logs}/worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent tells its processes by SIGTERM

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    from tqdm import tqdm

    # Its own lock is the system's, and would be told as leaked where a process is stopped.
    tqdm.set_lock(threading.RLock())
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()


def _do(job: Job) -> Done:
    started, fault = time.monotonic(), None
    try:
        job.do()
    except TrainingFailed as error:
        fault = str(error)
    except Interrupted as error:
        os._exit(128 + error.signum)
    return Done(fault, time.monotonic() - started)

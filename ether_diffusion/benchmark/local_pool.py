"""The local executor: processes of one thread each, so that no core waits for the threads of another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from concurrent.futures import Executor as Futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ether_diffusion.errors import Interrupted, TrainingFailed, UserError

from .config import BenchmarkConfig, Unit
from .executors import Executor, UnitJob


class Job(Protocol):
    """Work for a process; it can be pickled."""

    def __str__(self) -> str:
        """Its name in messages."""
        ...

    def do(self) -> None:
        """Do it, unless it is done.

        Raises:
            TrainingFailed: it cannot be done; the other jobs can.
            UserError: something in the settings, the data or the machine needs to be changed.
        """
        ...


class Pool:
    """Processes that do jobs; each starts the next job when it has done one.

    Args:
        say: Called with a line for each finished job.
    """

    def __init__(self, processes: Futures, say: Callable[[str], None]) -> None:
        self.processes, self.say = processes, say

    def run(self, jobs: Sequence[Job], title: str = "", after: Mapping[int, int] | None = None) -> dict[int, str]:
        """Do the jobs, the first ones first.

        Args:
            title: Starts each line.
            after: Jobs that build on another one, and which, by their places. They start after it, and fail with it.

        Returns:
            Why a job failed, by its place.

        Raises:
            Interrupted: a signal came; trainings in progress have written checkpoints.
            UserError: raised by a job; or a process was killed.
        """
        after, failed, count, digits = after or {}, {}, 0, len(str(len(jobs)))

        def report(place: int, result: str) -> None:
            nonlocal count
            count += 1
            self.say(f"{title} [{count:{digits}}/{len(jobs)}] {jobs[place]}: {result}".lstrip())

        def waiting_for(place: int) -> list[int]:
            return [later for later, earlier in after.items() if earlier == place]

        def fail(place: int, fault: str) -> None:
            failed[place] = fault
            for later in waiting_for(place):
                reason = f"{jobs[place]}, which it builds on, failed"
                report(later, reason)
                fail(later, reason)

        running: dict[Future[_Done], int] = {
            self.processes.submit(_do, job): place for place, job in enumerate(jobs) if place not in after
        }
        while running:
            ready, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(ready, key=running.__getitem__):
                place = running.pop(future)
                try:
                    done = future.result()
                except BrokenExecutor as error:
                    raise UserError(f"A worker process was lost: {error} Run the same command to resume.") from None
                report(place, f"{done.fault or 'done'} ({done.seconds:.0f} s)")
                if done.fault is not None:
                    fail(place, done.fault)
                    continue
                running |= {self.processes.submit(_do, jobs[later]): later for later in waiting_for(place)}
        return failed


@dataclass(frozen=True)
class PoolUnits(Executor):
    """Units as jobs of an open pool."""

    pool: Pool
    title: str = ""
    after: Mapping[Unit, Unit] = field(default_factory=dict)
    """Units that build on another one, and which."""

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        # First the units that others build on; then maps: a long unit that starts last leaves the other cores idle.
        waited = set(self.after.values())
        ordered = sorted(units, key=lambda unit: (unit not in waited, unit.subject is not None))
        places = {unit: place for place, unit in enumerate(ordered)}
        after = {places[one]: places[other] for one, other in self.after.items() if {one, other} <= places.keys()}
        config_json = config.model_dump_json()
        failed = self.pool.run([UnitJob(config_json, unit) for unit in ordered], self.title, after)
        return {ordered[place]: fault for place, fault in failed.items()}


@dataclass(frozen=True)
class LocalPool(Executor):
    """`workers` processes of this machine, of the config's `threads` or one thread each.

    What they print goes to `logs/` in the benchmark's folder.
    """

    workers: int

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        with open_pool(self.workers, config.output_dir / "logs", threads=config.threads or 1) as pool:
            return PoolUnits(pool).run(config, units)


@contextmanager
def open_pool(workers: int, logs: Path, say: Callable[[str], None] = print, *, threads: int = 1) -> Iterator[Pool]:
    """A pool whose processes end with the block; at a signal or an error, trainings write a checkpoint first.

    Signals are handled if this is the main thread; in another one they are the program's own.

    Args:
        logs: A folder for what the processes print.
        threads: Of each process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    others = multiprocessing.active_children()
    with _interrupting(), _threads(threads):
        processes = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (str(logs), os.getpid()))
        try:
            yield Pool(processes, say)
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            own = [process for process in multiprocessing.active_children() if process not in others]
            for process in own:
                process.terminate()
            for process in own:
                process.join()
            raise
        finally:
            processes.shutdown(cancel_futures=True)


@contextmanager
def _interrupting() -> Iterator[None]:
    """Raise `Interrupted` at Ctrl-C and SIGTERM. Python lets only the main thread handle signals."""

    def stop(signum: int, frame: object) -> None:
        raise Interrupted(signum, "Stopped, saved. The same command resumes.")

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Give the processes that start in the block so many threads each: they read this when they load torch."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@dataclass(frozen=True)
class _Done:
    """Why a job failed, if it did, and how long it took."""

    fault: str | None
    seconds: float


def _begin(logs: str, parent: int) -> None:
    """In each process: write its output to a file, and end with the parent."""
    log = os.open(f"{logs}/worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops its own by SIGTERM

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    from tqdm import tqdm

    # tqdm's own lock is a system semaphore, which Python would report as leaked where a process is stopped.
    tqdm.set_lock(threading.RLock())
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()


def _do(job: Job) -> _Done:
    started, fault = time.monotonic(), None
    try:
        job.do()
    except TrainingFailed as error:
        fault = str(error)
    except Interrupted as error:
        os._exit(128 + error.signum)
    return _Done(fault, time.monotonic() - started)

"""The local executor: processes of one thread each, so that no core waits for the threads of another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from ether_diffusion.errors import Interrupted, UserError

from .config import BenchmarkConfig, Unit
from .executors import RETRIES, Executor, Job, Pool, PoolUnits, WorkerLost, fault_of
from .plan import Plan

_SPAWN = multiprocessing.get_context("spawn")
MOST_WORKERS = 256


@dataclass(frozen=True)
class LocalPool(Executor):
    """`workers` processes of this machine, of the config's `threads` or one thread each.

    What they print goes to `logs/` in the benchmark's folder.
    """

    workers: int
    retries: int = RETRIES

    def check(self, plan: Plan) -> None:
        if self.workers > MOST_WORKERS:
            raise UserError(f"--workers {self.workers}: expected at most {MOST_WORKERS} processes of this machine.")
        super().check(plan)

    def run(self, config: BenchmarkConfig, units: Sequence[Unit]) -> dict[Unit, str]:
        logs, threads = config.output_dir / "logs", config.threads or 1
        with open_pool(self.workers, logs, threads=threads, retries=self.retries) as pool:
            return PoolUnits(pool).run(config, units)


@contextmanager
def open_pool(
    workers: int, logs: Path, say: Callable[[str], None] = print, *, threads: int = 1, retries: int = RETRIES
) -> Iterator[Pool]:
    """A pool whose processes end with the block; at a signal or an error, trainings write a checkpoint first.

    Signals are handled if this is the main thread; in another one they are the program's own.

    Args:
        logs: A folder for what the processes print.
        threads: Of each process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    pool = _Processes(workers, say, retries, logs)
    with _interrupting(), _threads(threads):
        try:
            yield pool
        finally:
            for worker in pool.started:
                worker.process.terminate()
            for worker in pool.started:
                worker.process.join()


@dataclass(eq=False)
class _Process:
    """A process that does jobs, and this side of the pipe to it."""

    process: BaseProcess
    pipe: connection.Connection


@dataclass
class _Processes(Pool[_Process]):
    """Processes that start when there is a job for them."""

    logs: Path = Path()
    started: list[_Process] = field(default_factory=list)
    idle: list[_Process] = field(default_factory=list)

    def start(self, job: Job) -> _Process:
        worker = self.idle.pop() if self.idle else self._new()
        with contextlib.suppress(ConnectionError):  # it was lost while idle; `result` finds out
            worker.pipe.send(job)
        return worker

    def wait(self, running: Collection[_Process]) -> _Process:
        ready = connection.wait([worker.pipe for worker in running])  # a lost process closes its end
        return next(worker for worker in running if worker.pipe in ready)

    def result(self, ended: _Process) -> str | None:
        try:
            result = ended.pipe.recv()
        except (EOFError, ConnectionError):
            ended.process.join()
            self.started.remove(ended)
            code = ended.process.exitcode or 0
            raise WorkerLost(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        self.idle.append(ended)
        if isinstance(result, Exception):
            raise result
        return result

    def _new(self) -> _Process:
        pipe, other = _SPAWN.Pipe()
        worker = _Process(_SPAWN.Process(target=_work, args=(other, self.logs)), pipe)
        worker.process.start()
        other.close()
        self.started.append(worker)
        return worker


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


def _work(pipe: connection.Connection, logs: Path) -> None:
    """In each process: do the jobs that come, write output to a file, and end with the parent."""
    log = os.open(logs / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops its own by SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tqdm import tqdm

    # tqdm's own lock is a system semaphore, which Python would report as leaked where a process is stopped.
    tqdm.set_lock(threading.RLock())
    from ether_diffusion.quiet import quiet_dependencies

    quiet_dependencies()
    while True:
        job = pipe.recv()
        try:
            result = fault_of(job)
        except Interrupted as error:
            os._exit(128 + error.signum)
        except (UserError, OSError) as error:
            result = error
        except Exception:  # other errors may not survive pickling
            result = RuntimeError(traceback.format_exc())
        pipe.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

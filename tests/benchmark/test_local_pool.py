"""The local pool: jobs that build on others, failures, threads, signals, and lost processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from ether_diffusion.benchmark import local_pool
from ether_diffusion.benchmark.executors import Job, Pool, fault_of
from ether_diffusion.benchmark.local_pool import open_pool
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError


@dataclass(frozen=True, eq=False)
class Note:
    """A job that lists itself, and may fail."""

    name: str
    done: list[str] = field(default_factory=list)
    fault: str | None = None

    def __str__(self) -> str:
        return self.name

    def do(self) -> None:
        self.done.append(self.name)
        if self.fault is not None:
            raise TrainingFailed(self.fault)


@dataclass(frozen=True)
class Touch:
    """A job for another process: writes the process and its threads to a file; then may sleep, fail or die."""

    file: Path
    then: str = ""

    def __str__(self) -> str:
        return self.file.name

    def do(self) -> None:
        again = self.file.exists()
        self.file.write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
        if self.then == "sleep":
            time.sleep(600)
        if self.then == "fail":
            raise TrainingFailed("the loss is nan")
        if self.then == "refuse":
            raise UserError("wrong")
        if self.then == "die" or (self.then == "die once" and not again):
            os.kill(os.getpid(), signal.SIGKILL)


class Here(Pool[Job]):
    """Does one job after another in this process."""

    def start(self, job: Job) -> Job:
        return job

    def wait(self, running: Collection[Job]) -> Job:
        return next(iter(running))

    def result(self, ended: Job) -> str | None:
        return fault_of(ended)


def test_a_job_that_builds_on_a_failed_one_fails_without_starting() -> None:
    done: list[str] = []
    jobs = [Note("first", done, "nan"), Note("second", done), Note("third", done), Note("fourth", done)]
    lines: list[str] = []
    failed = Here(1, lines.append).run(jobs, "x", {1: 0, 3: 2})
    assert failed == {0: "nan", 1: "first, which it builds on, failed"}
    assert sorted(done) == ["first", "fourth", "third"]
    assert len(lines) == len(jobs)


def test_a_job_starts_after_one_that_it_can_do_without() -> None:
    done: list[str] = []
    jobs = [Note("first", done, "nan"), Note("second", done)]
    assert Here(1, lambda line: None).run(jobs, after={1: 0}, optional=[0]) == {0: "nan"}
    assert done == ["first", "second"]


def test_a_failure_reaches_the_end_of_a_chain() -> None:
    done: list[str] = []
    jobs = [Note("first", done, "nan"), Note("second", done), Note("third", done)]
    lines: list[str] = []
    failed = Here(1, lines.append).run(jobs, after={1: 0, 2: 1})
    assert failed[2] == "second, which it builds on, failed"
    assert done == ["first"]
    assert [line.split()[0] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_have_one_thread_and_leave_environment_and_signals_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(local_pool, "_SPAWN", multiprocessing.get_context(start))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    lines: list[str] = []
    with open_pool(1, tmp_path / "logs", lines.append) as pool:
        assert signal.getsignal(signal.SIGTERM) not in handlers
        failed = pool.run([Touch(tmp_path / "a"), Touch(tmp_path / "b", "fail"), Touch(tmp_path / "c")])
    assert failed == {1: "the loss is nan"}
    assert [(tmp_path / name).read_text().split()[1] for name in "abc"] == ["1"] * 3
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [line.split(" (")[0] for line in lines] == ["[1/3] a: done", "[2/3] b: the loss is nan", "[3/3] c: done"]
    assert list((tmp_path / "logs").glob("worker-*.log"))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked from this one. A benchmark spawns them, and each imports torch for seconds."""
    monkeypatch.setattr(local_pool, "_SPAWN", multiprocessing.get_context("fork"))


@pytest.mark.slow
def test_a_pool_runs_in_a_thread(tmp_path: Path) -> None:
    """Only the main thread may handle signals; elsewhere the pool leaves them alone."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run() -> tuple[dict[int, str], Sequence[object]]:
        with open_pool(1, tmp_path / "logs", lambda line: None) as pool:
            inside = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            return pool.run([Touch(tmp_path / "a"), Touch(tmp_path / "b", "fail")]), inside

    with ThreadPoolExecutor(1) as thread:
        failed, inside = thread.submit(run).result(timeout=300)
    assert failed == {1: "the loss is nan"}
    assert (tmp_path / "a").is_file()
    assert inside == handlers


def test_a_signal_ends_the_processes_and_is_raised(forked: None, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "a").is_file() or not (tmp_path / "a").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="The same command resumes") as error, open_pool(1, tmp_path / "logs") as pool:
        pool.run([Touch(tmp_path / "a", "sleep"), Touch(tmp_path / "b")])
    assert error.value.signum == signal.SIGTERM
    assert not psutil.pid_exists(int((tmp_path / "a").read_text().split()[0]))
    assert not (tmp_path / "b").exists()


def test_a_job_whose_process_dies_is_tried_again_and_fails_alone(forked: None, tmp_path: Path) -> None:
    lines: list[str] = []
    with open_pool(1, tmp_path / "logs", lines.append, retries=1) as pool:
        failed = pool.run([Touch(tmp_path / "a", "die"), Touch(tmp_path / "b"), Touch(tmp_path / "c", "die once")])
    assert failed == {0: "lost 2 workers, the last one: SIGKILL"}
    assert lines[0] == "a: its worker was lost (SIGKILL); try 1 of 1"
    assert [line.split(" (")[0] for line in lines if line[0] == "["] == [
        "[1/3] a: lost 2 workers, the last one: SIGKILL",
        "[2/3] b: done",
        "[3/3] c: done",
    ]


def test_an_error_of_a_job_is_raised_here(forked: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^wrong$"), open_pool(1, tmp_path / "logs", lambda line: None) as pool:
        pool.run([Touch(tmp_path / "a", "refuse"), Touch(tmp_path / "b")])
    assert not (tmp_path / "b").exists()

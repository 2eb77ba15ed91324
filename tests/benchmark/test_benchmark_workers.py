"""The benchmark by several processes, whose trainings share passes: a local pool, shards, workers that are killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ether_diffusion.benchmark.executors import Shard
from ether_diffusion.benchmark.local_pool import LocalPool
from ether_diffusion.benchmark.ray_executor import RayExecutor
from ether_diffusion.benchmark.runner import run_benchmark
from ether_diffusion.evaluation.results import Results
from support.benchmark_folders import SUBJECTS, images, load, numbers, write_config, write_protocol
from support.optional import needs
from support.runs import metrics, trained_weights

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "eval/benchmark.py"
PATIENCE = 600  # seconds
METHODS = ("ether", "ether_plus")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert not run_benchmark(load(write(folder, write_protocol(folder)))).waiting
    return folder


def write(folder: Path, protocol: Path, pack: str = "auto") -> Path:
    """Two methods, whose trainings on two subjects share passes."""
    return write_config(folder, protocol, folder / "class_images", METHODS, pack)


def test_every_unit_of_a_pack_has_the_numbers_of_its_training_alone(finished: Path, tmp_path: Path) -> None:
    """To rounding, which AdamW's first step amplifies; and no score lies outside the other's interval."""
    assert not run_benchmark(load(write(tmp_path, finished / "subjects.yaml", "off"))).waiting
    for method, name in itertools.product(METHODS, SUBJECTS):
        packed, alone = (folder / f"out/dreambooth/{method}/runs/{name}" for folder in (finished, tmp_path))
        for own, other, most in zip(metrics(packed), metrics(alone), (1e-4, 5e-2), strict=True):
            assert own == pytest.approx(other, rel=most)
        assert trained_weights(packed).keys() == trained_weights(alone).keys()
    for method in METHODS:
        packed, alone = (
            Results.read(folder / f"out/dreambooth/{method}/results.json") for folder in (finished, tmp_path)
        )
        for metric, found in packed.metrics.items():
            assert alone.metrics[metric].low <= found.value <= alone.metrics[metric].high


def stages(out: Path) -> str:
    files = sorted(out.glob("dreambooth/*/stages/robot.json"))
    return files[0].read_text() if files else ""


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "in training": lambda out: any(out.glob("dreambooth/*/runs/robot/checkpoints/step-000001")),
    "in generating": lambda out: '"drawn"' in stages(out),
    "in scoring": lambda out: '"scored"' in stages(out),
    "with a subject done": lambda out: any(out.glob("dreambooth/*/scores/robot.json")),
}


def test_a_command_killed_at_every_stage_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    config = write(tmp_path, finished / "subjects.yaml")
    command = [sys.executable, str(SCRIPT), "--config", str(config)]
    killed = []
    for name, reached in MOMENTS.items():
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + PATIENCE
            while process.poll() is None and not reached(tmp_path / "out") and time.monotonic() < until:
                time.sleep(0.002)
            if process.poll() is None:
                process.kill()
                killed.append(name)
    assert len(killed) >= 3  # the last moments are short
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "table.md" in done.stdout
    assert images(tmp_path / "out") == images(finished / "out")
    assert numbers(tmp_path / "out") == numbers(finished / "out")


def test_a_local_pool_and_shards_give_the_same_numbers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(write(tmp_path, finished / "subjects.yaml"))
    first = run_benchmark(config, Shard(1, 2, LocalPool(2)))
    assert len(first.waiting) == 2
    assert not run_benchmark(config, LocalPool(2)).waiting
    assert "[5/5] dreambooth/" in capsys.readouterr().out
    assert "training together" in "".join(log.read_text() for log in (tmp_path / "out/logs").glob("worker-*.log"))
    assert images(tmp_path / "out") == images(finished / "out")
    assert numbers(tmp_path / "out") == numbers(finished / "out")


def test_ray_with_a_worker_killed_gives_the_same_numbers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("ray")
    config = load(write(tmp_path, finished / "subjects.yaml"))
    killed: list[int] = []
    over = threading.Event()

    def kill_the_robots_worker() -> None:
        """Once it has taken its first step."""
        worker = None
        while worker is None and not over.wait(0.05):
            workers = (process for process in psutil.Process().children(recursive=True) if is_worker(process))
            worker = next((one for one in workers if holds(one, tmp_path / "out/.locks", "robot")), None)
        while worker is not None and not MOMENTS["in training"](tmp_path / "out") and not over.wait(0.005):
            pass
        if worker is not None:
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    killer = threading.Thread(target=kill_the_robots_worker)
    killer.start()
    try:
        outcome = run_benchmark(config, executor=RayExecutor(workers=2))
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1
    assert "robot and 1 more, trained together: its worker was lost" in capsys.readouterr().out
    assert not outcome.waiting
    assert images(tmp_path / "out") == images(finished / "out")
    assert numbers(tmp_path / "out") == numbers(finished / "out")


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "do_unit" in " ".join(process.cmdline())
    return False


def holds(process: psutil.Process, folder: Path, subject: str) -> bool:
    """Whether it has a lock of the subject open."""
    with contextlib.suppress(psutil.Error):
        return any(Path(file.path).parent == folder and subject in file.path for file in process.open_files())
    return False

"""Killed, interrupted or out of disk, and run again, a command ends bitwise like one that was not disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from ether_diffusion.files import digest_of, digest_of_file, step_of
from robustness.case import TRAIN, TRAIN_MAPS, Case, World, split
from robustness.forked import Server
from support.benchmark_folders import write_config, write_protocol

SECONDS = 600.0
PLACES = ("work", "home", "cache", "tmp")
STEPS = split("training.steps=4 training.checkpoint_every=1 training.resume=true training.batch_size=1")
SAMPLED = split("validation.images_per_prompt=1 validation.sampling.steps=1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "cached latents": (*TRAIN, *STEPS, "data.cache=true", "data.crop=center"),
    "class images with workers": (
        *(*TRAIN, *STEPS, *SAMPLED, "training.workers=2", "validation.prompts=[a cup]", "validation.every=2"),
        "data.prior={num_images: 6, sampling: {steps: 1}}",
    ),
    "controllable": (
        *(*TRAIN_MAPS, *STEPS, "data.dataset_dir=$SCENES", "validation.images=1", "validation.every=2"),
        "validation.sampling.steps=1",
    ),
    "twelve steps": (*TRAIN, *split("training.steps=12 training.resume=true")),
    "full UNet": (*TRAIN, *STEPS, "training.steps=2", "adapter={method: full}"),
    "generate": split("generate --base-model tiny --prompt a --num-images 8 --steps 1 --output out"),
    "benchmark": split("benchmark --config benchmark.yaml"),
    "evaluate": split("evaluate $RUN --num-images 1 --output out"),
}
QUICK = {"cached latents": 2, "generate": 4}
"""These are quick tests: one kill each, at this share of six."""


def prepared(folder: Path, name: str) -> Path:
    """The folders of one command."""
    for place in PLACES:
        (folder / place).mkdir(parents=True)
    if name == "benchmark":
        work = folder / "work"
        config = write_config(work, write_protocol(work), Path("class_images"))
        config.write_text(config.read_text().replace(f"{work}/", ""))  # the same text in every folder
    return folder


def essence(folder: Path) -> dict[str, str]:
    """Digests of all weights, states, images and numbers that a command left, by path, without wall-clock times."""
    found = {}
    for path in sorted((folder / "work").rglob("*")):
        name = path.relative_to(folder / "work").as_posix()
        if path.suffix in (".safetensors", ".png") or path.name in ("scores.json", "results.json", "images.jsonl"):
            found[name] = digest_of_file(path)
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = digest_of(*(json.dumps({**row, "seconds": 0}) for row in rows))
    return found


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*.partial")]


def count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[dict[str, str], int]]:
    """By command, made when it is asked for: what it leaves, and how many files lie there in the end."""

    class Runs(dict[str, tuple[dict[str, str], int]]):
        def __missing__(self, name: str) -> tuple[dict[str, str], int]:
            folder = prepared(tmp_path_factory.mktemp("undisturbed") / "once", name)
            code, _, errors = server.run(Case("crash", COMMANDS[name]), folder, world, seconds=SECONDS)
            assert code == 0, errors
            self[name] = essence(folder), count(folder)
            return self[name]

    return Runs()


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share / 6, marks=() if QUICK.get(name) == share else pytest.mark.slow)
        for name in COMMANDS
        if name != "twelve steps"
        for share in ((3,) if name == "evaluate" else range(1, 6))  # evaluate takes minutes
    ],
)
def test_killed_and_run_again_it_ends_the_same(
    server: Server,
    world: World,
    undisturbed: Mapping[str, tuple[dict[str, str], int]],
    tmp_path: Path,
    name: str,
    share: float,
) -> None:
    """SIGKILL, when a share of the files that it leaves is written."""
    expected, files = undisturbed[name]
    folder, case = prepared(tmp_path / "killed", name), Case("crash", COMMANDS[name])
    begin = count(folder)
    kill = {"signal": signal.SIGKILL, "group": True, "files": begin + max(1, round((files - begin) * share))}
    code, _, errors = server.run(case, folder, world, interrupt=kill, seconds=SECONDS)
    assert code == -signal.SIGKILL, errors
    code, _, errors = server.run(case, folder, world, seconds=SECONDS)
    assert (code, errors) == (0, "")
    assert essence(folder) == expected
    assert leftovers(folder) == []


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def interrupted(server: Server, world: World, folder: Path, number: signal.Signals, group: bool, workers: int) -> Case:
    """A run of twelve steps that a signal ends after its first ones, with one line and one checkpoint."""
    case = Case("crash", (*COMMANDS["twelve steps"], f"training.workers={workers}"))
    interrupt = {"signal": number, "group": group, "lines": ("work/out/metrics.jsonl", 1)}
    code, _, errors = server.run(case, folder, world, interrupt=interrupt, seconds=SECONDS)
    assert code == 128 + number, errors
    assert len(errors.splitlines()) == 1
    assert "training.resume=true" in errors
    (saved,) = (folder / "work/out/checkpoints").iterdir()
    assert saved.name != "step-000012"
    assert step_of(saved) == len((folder / "work/out/metrics.jsonl").read_text().splitlines())
    return case


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_group_spares_the_workers_that_load_data(
    server: Server, world: World, tmp_path: Path, number: signal.Signals
) -> None:
    """As terminals send it; SIGTERM, which batch schedulers send, is among the cases below."""
    interrupted(server, world, prepared(tmp_path / "interrupted", ""), number, group=True, workers=2)


@pytest.mark.parametrize(
    ("number", "group", "workers"),
    [
        pytest.param(number, group, workers, marks=() if (number, group, workers) == QUICK_SIGNAL else pytest.mark.slow)
        for QUICK_SIGNAL in [(signal.SIGTERM, True, 2)]
        for number in SIGNALS
        for group in (False, True)
        for workers in (0, 2)
    ],
)
def test_a_signal_saves_the_step_in_hand_and_the_resumed_run_ends_the_same(
    server: Server,
    world: World,
    undisturbed: Mapping[str, tuple[dict[str, str], int]],
    tmp_path: Path,
    number: signal.Signals,
    group: bool,
    workers: int,
) -> None:
    expected, _ = undisturbed["twelve steps"]
    folder = prepared(tmp_path / "interrupted", "")
    case = interrupted(server, world, folder, number, group, workers)
    code, _, errors = server.run(case, folder, world, seconds=SECONDS)
    assert (code, errors) == (0, "")
    ended = essence(folder)
    assert {name: ended.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "size", [pytest.param(100_000), *(pytest.param(size, marks=pytest.mark.slow) for size in (1_000, 200_000, 400_000))]
)
def test_files_that_the_disk_refuses_and_then_takes_end_the_same(
    server: Server,
    world: World,
    undisturbed: Mapping[str, tuple[dict[str, str], int]],
    tmp_path: Path,
    size: int,
) -> None:
    expected, _ = undisturbed["cached latents"]
    folder, words = prepared(tmp_path / "full", ""), COMMANDS["cached latents"]
    code, _, errors = server.run(Case("crash", words, limits={"FSIZE": size}), folder, world, seconds=SECONDS)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert leftovers(folder) == []
    code, _, errors = server.run(Case("crash", words), folder, world, seconds=SECONDS)
    assert (code, errors) == (0, "")
    assert essence(folder) == expected


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of this size at a folder; skips where none may be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["200k", "400k", "800k", "1m"])
def test_a_full_disk_that_is_enlarged_ends_the_same(
    server: Server, world: World, undisturbed: Mapping[str, tuple[dict[str, str], int]], tmp_path: Path, size: str
) -> None:
    expected, _ = undisturbed["cached latents"]
    folder, case = tmp_path / "full", Case("crash", COMMANDS["cached latents"])
    with small_disk(folder, size):
        prepared(folder, "")
        code, _, errors = server.run(case, folder, world, seconds=SECONDS)
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert "No space left on device" in errors
        subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
        code, _, errors = server.run(case, folder, world, seconds=SECONDS)
        assert (code, errors) == (0, "")
        assert essence(folder) == expected

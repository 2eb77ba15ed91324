"""Every bad input ends in one line and its exit code: no traceback, no hang, and nothing changed on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from robustness.case import Case, World
from robustness.tables import CASES
from support.sharing import made_once
from support.snapshots import DIRECTORY, changes, snapshot

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("fork_server.py")
SECONDS = float(os.environ.get("BAD_INPUT_SECONDS", "60"))
"""No case takes longer."""
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS")


def environment(folder: Path, changed: Mapping[str, str | None]) -> dict[str, str]:
    own = {
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "LC_ALL": "C.UTF-8",
        "MPLCONFIGDIR": str(folder / "tmp"),
    }
    offline = {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp")}
    inherited = {key: os.environ[key] for key in KEPT if key in os.environ}
    values = {**inherited, **own, **offline, **changed}
    return {key: value for key, value in values.items() if value is not None}


class Server:
    """The process that forks a child for each command."""

    def __init__(self, folder: Path) -> None:
        variables = {**environment(folder, {}), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with (folder / "server.txt").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, cwd=folder,
            )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, case: Case, folder: Path, world: World) -> tuple[int | None, str, str]:
        """Exit code, stdout and stderr; None for the code: it was still running after `SECONDS`."""
        request = {
            "arguments": words(case, world),
            "folder": str(folder / "work"),
            "environment": environment(folder, case.environment),
            "limits": dict(case.limits),
            "seconds": SECONDS,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["code"], answer["stdout"], answer["stderr"]


def words(case: Case, world: World) -> list[str]:
    found = list(case.words)
    for name, path in world.items():
        found = [word.replace(f"${name}", str(path)) for word in found]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(timeout=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, server: Server) -> World:
    from robustness.world import make_world

    def make(folder: Path) -> None:
        def run(*command: str) -> None:
            place = folder / "while_made"
            for name in ("work", "home", "cache", "tmp"):
                (place / name).mkdir(parents=True, exist_ok=True)
            code, _, errors = server.run(Case("world", command), place, {})
            assert code == 0, errors

        folder.mkdir()
        make_world(folder, run)

    folder = made_once(tmp_path_factory, "bad_inputs", make)
    return {"RUN": finished_run, **{path.name.upper(): path for path in folder.iterdir() if path.name.islower()}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The case's own working directory, home, caches and temporary files."""
    folder = tmp_path / "case"
    for name in ("work", "home", "cache", "tmp"):
        (folder / name).mkdir(parents=True)
    return folder


def check(case: Case, code: int | None, out: str, errors: str) -> None:
    """The exit code, and a line a fault on stderr that names what was given; after argparse's usage, if that fails."""
    assert code is not None, f"it hangs; so far: {out[-300:]}{errors[-300:]}"
    assert "Traceback" not in out + errors, errors[-2000:]
    assert code in case.codes, f"exit code {code}\n{out[-500:]}{errors[-500:]}"
    lines = errors.splitlines()
    if lines and lines[0].startswith("usage: "):
        lines = lines[-1:]
    if code:
        assert len(lines) == case.faults or (lines and not case.faults), errors
        assert all(line.startswith("ether-diffusion") for line in lines), errors
        assert case.says in errors, errors


def watch(case: Case, place: Path, world: World) -> Callable[[int | None], None]:
    """Look at the disk before a command; what is returned looks again, and compares. Caches may be filled."""
    shared, own = list(world.values()), [place / "work", place / "home"]
    before = snapshot(*shared, *own)

    def compare(code: int | None) -> None:
        after = snapshot(*shared, *own)
        changed = changes(before, after)
        if code == 0 or case.writes:  # whole files of its own; nothing that was there
            assert [path for path in changed if path in before and before[path][0] != DIRECTORY] == []
            assert [path for path in after if path.endswith(".partial")] == []
        else:
            assert changed == []

    return compare


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.kind}: {case.name}") for case in CASES])
def test_a_bad_input_is_one_line_and_changes_nothing(case: Case, server: Server, world: World, place: Path) -> None:
    if case.make is not None:
        case.make(place / "work", world)
    check_disk = watch(case, place, world)
    code, out, errors = server.run(case, place, world)
    check(case, code, out, errors)
    check_disk(code)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.kind}: {case.name}") for case in CASES[::10]])
def test_a_tenth_of_them_as_whole_processes(case: Case, world: World, place: Path) -> None:
    if case.make is not None:
        case.make(place / "work", world)
    check_disk = watch(case, place, world)
    command = [sys.executable, str(SERVER), json.dumps(dict(case.limits)), *words(case, world)]
    variables = {**environment(place, case.environment), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=place / "work", env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS * 3
    )
    code = done.returncode
    check(case, code, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
    check_disk(code)


def test_the_table_has_300_cases_of_30_kinds_and_no_case_twice() -> None:
    kinds = Counter(case.kind for case in CASES)
    assert len(CASES) >= 300
    assert len(kinds) >= 30
    assert [key for key, n in Counter((case.kind, case.name) for case in CASES).items() if n > 1] == []

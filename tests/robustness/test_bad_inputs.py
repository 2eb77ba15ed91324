"""Every bad input ends in one line and its exit code: no traceback, no hang, and nothing changed on the disk."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from robustness.case import Case, World
from robustness.forked import SECONDS, SERVER, Server, environment, words
from robustness.tables import CASES
from support.snapshots import DIRECTORY, changes, snapshot

ROOT = Path(__file__).resolve().parents[2]
QUICK = 1
"""So many cases of each kind are in the quick tests; the others are slow ones."""


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


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.kind}: {case.name}", marks=() if number < QUICK else pytest.mark.slow)
        for _, of_a_kind in itertools.groupby(CASES, lambda case: case.kind)
        for number, case in enumerate(of_a_kind)
    ],
)
def test_a_bad_input_is_one_line_and_changes_nothing(case: Case, server: Server, world: World, place: Path) -> None:
    if case.make is not None:
        case.make(place / "work", world)
    check_disk = watch(case, place, world)
    code, out, errors = server.run(case, place, world)
    check(case, code, out, errors)
    check_disk(code)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.kind}: {case.name}") for case in CASES[::30]])
def test_some_of_them_as_whole_processes(case: Case, world: World, place: Path) -> None:
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


def test_importing_the_package_says_nothing(server: Server) -> None:
    """torchao and bitsandbytes, which PEFT imports where they are installed, would print notices."""
    assert server.imported["printed"] == 0
    assert server.imported["levels"] == {"bitsandbytes": 0, "torchao": 0}

"""Commands as children of `fork_server.py`, each in a folder of its own, which may be sent a signal on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustness.case import Case, World

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
    """The process that forks a child for each command.

    Attributes:
        imported: What the import of the package alone left: bytes `printed` on stderr, `levels` of others' loggers.
    """

    def __init__(self, folder: Path) -> None:
        variables = {**environment(folder, {}), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with (folder / "server.txt").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, cwd=folder,
            )  # fmt: skip
        self.imported = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(
        self,
        case: Case,
        folder: Path,
        world: World,
        *,
        interrupt: Mapping[str, Any] | None = None,
        seconds: float = SECONDS,
    ) -> tuple[int | None, str, str]:
        """Exit code (minus the number of the signal that killed it), stdout and stderr.

        None for the code: it was still running after so many seconds.

        Args:
            interrupt: As `fork_server.Interruption` takes it.
        """
        request = {
            "arguments": words(case, world),
            "folder": str(folder / "work"),
            "environment": environment(folder, case.environment),
            "limits": dict(case.limits),
            "seconds": seconds,
            "interrupt": interrupt,
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

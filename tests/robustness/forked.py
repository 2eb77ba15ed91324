"""Commands as children of `fork_server.py`, each in a folder of its own, which may be sent a signal on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from robustness.case import Case, World

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("fork_server.py")
SECONDS = float(os.environ.get("BAD_INPUT_SECONDS", "60"))
"""No case takes longer."""
PROGRESS = re.compile(r"[a-z ]+: \d+ of \d+ [a-z]+, ")
"""Lines that come every half minute, on a machine so busy that a command takes as long."""
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
    """A connection to the process that forks a child for each command, which the first of a session's workers starts.

    Args:
        folder: The workers' common one.

    Attributes:
        imported: What the import of the package alone left: bytes `printed` on stderr, `levels` of others' loggers.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        place = folder / "socket"
        with FileLock(folder / "lock"):
            ready = ""
            with contextlib.suppress(OSError):  # there is none yet
                ready = self._connect(place.read_text())
            if not ready:  # or it ended with its last client
                address = str(Path(tempfile.mkdtemp()) / "socket")  # whose name has at most 107 bytes
                place.write_text(address)
                ready = self._start(folder, address)
        self.imported = json.loads(ready)

    def _connect(self, address: str) -> str:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)
        self.lines = self.socket.makefile("rw", encoding="utf-8")
        return self.lines.readline()

    def _start(self, folder: Path, address: str) -> str:
        variables = {**environment(folder, {}), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, str(SERVER), "--serve", address]
        with (folder / "server.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, cwd=folder
            )
        while True:
            with contextlib.suppress(OSError):
                return self._connect(address)
            assert process.poll() is None, (folder / "server.txt").read_text()
            time.sleep(0.1)

    def close(self) -> None:
        """Its process ends when the last client is gone."""
        self.lines.close()
        self.socket.close()

    def run(
        self,
        case: Case,
        folder: Path,
        world: World,
        *,
        interrupt: Mapping[str, Any] | None = None,
        seconds: float = SECONDS,
    ) -> tuple[int | None, str, str]:
        """Exit code (minus the number of the signal that killed it), stdout and stderr without the lines of progress.

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
        print(json.dumps(request), file=self.lines, flush=True)
        answer = json.loads(self.lines.readline())
        errors = answer["stderr"].splitlines(keepends=True)
        return answer["code"], answer["stdout"], "".join(line for line in errors if not PROGRESS.match(line))


def words(case: Case, world: World) -> list[str]:
    found = list(case.words)
    for name, path in world.items():
        found = [word.replace(f"${name}", str(path)) for word in found]
    return found

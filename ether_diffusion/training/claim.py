"""One training at a time in a run folder: a lock that names its host, its process and when that began."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from ether_diffusion.errors import UserError
from ether_diffusion.files import short_digest
from ether_diffusion.input_files import read_object

LOCK = ".lock"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other training may use the folder. It is made if it is missing, and goes if it stays empty.

    The lock of a process of this host that has ended is taken over.

    Raises:
        UserError: a running process has the folder, or one of another host, of which nobody here knows whether it runs.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, own = folder / LOCK, json.dumps(_this_process())
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"ether_diffusion-{short_digest(str(lock.resolve()))}.lock"):
            # Of this host's processes one at a time looks: two that find a dead one's lock must not both replace it.
            _clear_or_refuse(lock)
            _create(lock, own)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if lock.read_text(encoding="utf-8") == own:
                    lock.unlink()
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}


def _create(lock: Path, content: str) -> None:
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:  # another host was faster
        _clear_or_refuse(lock)
        raise


def _clear_or_refuse(lock: Path) -> None:
    try:
        holder = read_object(lock)
        host, process, started = holder["host"], int(holder["process"]), float(holder["started"])
    except (OSError, ValueError, TypeError, KeyError):
        if not os.path.lexists(lock):
            return
        raise UserError(
            f"output_dir: {lock.parent} is claimed, and {lock} does not say by whom. If no training uses it, delete "
            "that file."
        ) from None
    who = f"process {process} on {host}, started {datetime.fromtimestamp(started):%Y-%m-%d %H:%M}"
    if host != socket.gethostname():
        raise UserError(
            f"output_dir: {lock.parent} is in use by {who}. If that training has ended, delete {lock}; else choose "
            "another output_dir."
        )
    if _is_running(process, started):
        raise UserError(
            f"output_dir: {lock.parent} is in use by {who}. Wait until it has ended, or choose another output_dir."
        )
    lock.unlink()


def _is_running(process: int, started: float) -> bool:
    """Whether this process runs, and is the one that began then: numbers are used again."""
    try:
        return abs(psutil.Process(process).create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True

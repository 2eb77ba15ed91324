"""Files and folders: written whole or not at all, digested, claimed; checkpoints by step; an OSError as one line.

No other module makes partial files, computes digests or spells the name of a checkpoint's folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, and its folder if it is missing; a crash leaves what was there before."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; the file takes `path` when the block ends, and goes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it takes the place of `path` when the block ends.

    If the block fails, the folder goes, and an older one at `path` stays as it was. The files are on the disk before
    the rename.
    """
    partial, previous = partial_of(path), path.with_name(f".{path.name}.{os.getpid()}.previous")
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        if path.exists():
            path.replace(previous)
        try:
            partial.replace(path)
        except OSError:
            if previous.exists():
                previous.replace(path)
            raise
    finally:
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """The hidden name beside `path` that this process writes to before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def digest_of(*contents: bytes | str) -> str:
    """SHA-256 of the contents one after the other, as hexadecimal digits."""
    digest = Digest()
    for content in contents:
        digest.update(content)
    return digest.hex()


def digest_of_json(value: Any, **options: Any) -> str:
    """SHA-256 of a value as JSON. `options` are `json.dumps`'s."""
    return digest_of(json.dumps(value, **options))


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    digest = Digest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hex()


class Digest:
    """A SHA-256 that grows part by part; text counts as UTF-8."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, content: bytes | str) -> None:
        self._hash.update(content.encode("utf-8") if isinstance(content, str) else content)

    def hex(self) -> str:
        return self._hash.hexdigest()

    def bytes(self) -> bytes:
        return self._hash.digest()


def checkpoint_name(step: int) -> str:
    """`step-000200`: the name of the folder, or the stem of the picture, that belongs to a step."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is not one."""
    name = re.fullmatch(r"step-(\d+)", path.name)
    return int(name[1]) if name else None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, a run's `checkpoints/`, the lowest step first: by number, not by text."""
    found = [path for path in root.iterdir() if step_of(path) is not None] if root.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path) or 0, path.name))


def check_free(folder: Path, setting: str, remedy: str) -> None:
    """Refuse an output folder that is a file or holds something.

    Args:
        setting: The setting or option that named it, for the message.
        remedy: What to do about a folder that is not empty, as a sentence.

    Raises:
        UserError: it is not free. Nothing is written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{setting}: {folder} is a file; expected a folder, new or empty.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{setting}: {folder} is not empty. {remedy}")


def os_error_line(error: OSError) -> str:
    """One line for an `OSError`: the file, the reason, and what to do where that is known."""
    files: Iterable[object] = filter(None, (error.filename, error.filename2))
    place = " -> ".join(map(str, files))
    reason = error.strerror or str(error) or type(error).__name__
    remedy = {
        errno.ENOSPC: " Free some space on that disk and run the command again.",
        errno.EDQUOT: " Free some space in your quota and run the command again.",
        errno.EROFS: " Choose an output folder that can be written to.",
        errno.EACCES: " Check the permissions of that path.",
        errno.EMFILE: " Raise the limit of open files (ulimit -n).",
    }.get(error.errno or 0, "")
    return f"{place}: {reason}.{remedy}" if place else f"{reason}.{remedy}"


def _sync(folder: Path) -> None:
    """Have every file on the disk before a rename declares them complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

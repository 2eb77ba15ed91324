"""Results in places that the user names: files that replace nothing but what this program wrote, unchanged since."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .files import digest_of_file, whole_file

OWN_FILES = ".ether_diffusion"
"""The list of a folder's files that `own_file` wrote: a line each, with SHA-256 and name."""


def write_own(path: Path, content: str | bytes) -> None:
    """`own_file` with this content; text as UTF-8."""
    with own_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def own_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """As `whole_file`, but replaces only what `own_file` wrote there and nobody has changed since.

    A file that has this content already stays as it is.

    Raises:
        OSError: as `whole_file`.
        UserError: as `check_own`.
    """
    with whole_file(path, sync=sync, unless=_is_kept) as partial:
        yield partial


def check_own(*paths: Path) -> None:
    """Refuse, before long work, to write results over files that are not ours.

    Raises:
        UserError: one of the paths is a folder, pipe or socket, or a file with content that `own_file` did not write
            there, or that was changed since.
    """
    for path in map(Path, map(os.path.realpath, paths)):
        if path.is_dir() or path.is_fifo() or path.is_socket() or path.is_block_device():
            raise UserError(f"{path} is no file; expected a name that is free.")
        if path.is_file() and path.stat().st_size and not is_own(path):
            raise UserError(
                f"{path} was not written by this program, or was changed since; it stays as it is. Choose another "
                "output, or move that file away."
            )


def is_own(path: Path) -> bool:
    """Whether a file is there, and as `own_file` wrote it."""
    return path.is_file() and digest_of_file(path) in _own_digests(path)


def _is_kept(path: Path, partial: Path) -> bool:
    """Whether `path` has the content of `partial` already. If not, `partial` is listed as ours."""
    digest = digest_of_file(partial)
    if path.is_file() and digest_of_file(path) == digest:
        return True
    check_own(path)
    if digest not in _own_digests(path):
        with (path.parent / OWN_FILES).open("a", encoding="utf-8") as file:
            file.write(f"{digest} {json.dumps(path.name)}\n")  # before the rename: a crash in between loses nothing
    return False


def _own_digests(path: Path) -> set[str]:
    """The digests of all contents that `own_file` wrote to a path."""
    try:
        lines = (path.parent / OWN_FILES).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    name = json.dumps(path.name)
    return {digest for digest, _, listed in (line.partition(" ") for line in lines) if listed == name}

"""What stands on the disk: to compare a folder before and after a command."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ether_diffusion.files import digest_of_file

DIRECTORY = f"{stat.S_IFDIR:o}"
Snapshot = dict[str, tuple[str, int, str]]
"""By path: what it is, its mode, and its content, as a digest or a link's target."""


def snapshot(*roots: Path) -> Snapshot:
    """All that is under these folders; no link is followed, no pipe or device is opened."""
    return {os.fsdecode(path): _entry(path) for root in roots for path in (root, *root.rglob("*"))}


def _entry(path: Path) -> tuple[str, int, str]:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "link", 0, str(path.readlink())
    kind = stat.S_IFMT(status.st_mode)
    content = f"{digest_of_file(path)} {status.st_mtime_ns}" if kind == stat.S_IFREG else ""
    return f"{kind:o}", stat.S_IMODE(status.st_mode), content


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths that are there in one of them only, or that differ."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))

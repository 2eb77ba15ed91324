"""Text files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its name: beside it, hidden, and where no other process writes."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file, and its folder if it is missing; a crash leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

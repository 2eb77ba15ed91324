"""The folders of caches: files that can be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`~/.cache/ether_diffusion/NAME`, or the same under XDG_CACHE_HOME."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ether_diffusion" / name

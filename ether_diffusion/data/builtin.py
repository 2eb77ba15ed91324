"""`builtin:scenes`: the miniature's scenes as an ADE20K folder, drawn once into a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ether_diffusion import tinyworld
from ether_diffusion.data.caches import cache_folder
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, write_ade20k_splits

SCENES: dict[SplitName, int] = {"training": 2000, "validation": 200}
"""Scenes a split."""


def builtin_scenes(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of `builtin:scenes`, drawn if the cache does not hold it: whole or not at all, by whoever is first.

    Args:
        cache_dir: Default: `~/.cache/ether_diffusion`. The scenes are in `scenes/` there.

    Raises:
        UserError: Another name.
    """
    if name != "builtin:scenes":
        raise UserError(f"no built-in pairs {name!r}.{did_you_mean(name, ['builtin:scenes'])} Built in: builtin:scenes")
    root = Path(cache_dir).expanduser() / "scenes" if cache_dir else cache_folder("scenes")
    folder = root / _version()
    if folder.is_dir():
        return folder
    # Other processes may draw the same at the same time: each has a folder of its own, and the first to finish wins.
    own = root / f".{folder.name}.{os.getpid()}"
    seeds: dict[SplitName, range] = {
        split: range(FIRST_SEEDS[split], FIRST_SEEDS[split] + count) for split, count in SCENES.items()
    }
    try:
        write_ade20k_splits(own, seeds, shown=True)
        own.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def _version() -> str:
    """A digest of the code that draws, so that a cache from other code is not taken for these scenes."""
    digest = hashlib.blake2b(repr(SCENES).encode(), digest_size=6)
    for file in sorted(Path(tinyworld.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

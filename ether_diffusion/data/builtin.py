"""`builtin:scenes`: the miniature's scenes as an ADE20K folder, rendered once into a cache."""

from __future__ import annotations

from pathlib import Path

from ether_diffusion import tinyworld
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.files import cache_folder, short_digest, whole_folder
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, fill_ade20k_folder

SCENES: dict[SplitName, int] = {"training": 2000, "validation": 200}
"""Scenes per split."""


def builtin_scenes(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of `builtin:scenes`, rendered if the cache does not have it; the first process to finish keeps it.

    Args:
        cache_dir: The scenes are in its `scenes/`; default: `~/.cache/ether_diffusion`.

    Raises:
        UserError: Another name.
    """
    if name != "builtin:scenes":
        raise UserError(f"no built-in pairs {name!r}.{did_you_mean(name, ['builtin:scenes'])} Built in: builtin:scenes")
    folder = (Path(cache_dir).expanduser() / "scenes" if cache_dir else cache_folder("scenes")) / _version()
    if not folder.is_dir():
        seeds: dict[SplitName, range] = {
            split: range(FIRST_SEEDS[split], FIRST_SEEDS[split] + count) for split, count in SCENES.items()
        }
        with whole_folder(folder, replace=False, sync=False) as partial:
            fill_ade20k_folder(partial, seeds, shown=True)
    return folder


def _version() -> str:
    """A digest of the rendering code, so that scenes that other code has rendered are not taken for these."""
    code = [file.read_bytes() for file in sorted(Path(tinyworld.__file__).parent.glob("*.py"))]
    return short_digest(repr(SCENES), *code, size=6)

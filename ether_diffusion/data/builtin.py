"""`builtin:scenes`: the miniature's scenes as an ADE20K folder, rendered once into a cache."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ether_diffusion import tinyworld
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.files import Digest, cache_folder, short_digest, whole_folder
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, fill_ade20k_folder

SCENES: dict[SplitName, int] = {"training": 2000, "validation": 200}
"""Scenes per split."""

DIGEST = ".sha256"
"""The file with the digest of the others."""

RENDERED = ("images/*/*.jpg", "annotations/*/*.png", *(f"captions/{split}.jsonl" for split in SCENES), "*.txt", "*.csv")
"""The patterns of those files."""


def builtin_scenes(name: str, cache_dir: Path | None = None) -> Path:
    """The folder of `builtin:scenes`, rendered if the cache does not have it, or has changed since.

    The first process to finish keeps its scenes.

    Args:
        cache_dir: The scenes are in its `scenes/`; default: `~/.cache/ether_diffusion`.

    Raises:
        UserError: Another name.
    """
    if name != "builtin:scenes":
        raise UserError(f"no built-in pairs {name!r}.{did_you_mean(name, ['builtin:scenes'])} Built in: builtin:scenes")
    folder = (Path(cache_dir).expanduser() / "scenes" if cache_dir else cache_folder("scenes")) / _version()
    if not _is_whole(folder):
        seeds: dict[SplitName, range] = {
            split: range(FIRST_SEEDS[split], FIRST_SEEDS[split] + count) for split, count in SCENES.items()
        }
        with whole_folder(folder, replace=folder.is_dir(), sync=False) as partial:
            fill_ade20k_folder(partial, seeds, shown=True)
            (partial / DIGEST).write_text(_digest(partial), encoding="utf-8")
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there, and its files are those that were written."""
    if not (folder / DIGEST).is_file():
        return False
    state = [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return _matches(folder, tuple(state))


@lru_cache(maxsize=4)  # a run looks for its data set several times, and reading 4,400 files takes a moment
def _matches(folder: Path, state: tuple[tuple[Path, int], ...]) -> bool:
    return (folder / DIGEST).read_bytes() == _digest(folder).encode()


def _digest(folder: Path) -> str:
    digest = Digest()
    for path in sorted(path for pattern in RENDERED for path in folder.glob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ", path.read_bytes())
    return digest.hex()


def _version() -> str:
    """A digest of the rendering code, so that scenes that other code has rendered are not taken for these."""
    code = [file.read_bytes() for file in sorted(Path(tinyworld.__file__).parent.glob("*.py"))]
    return short_digest(repr(SCENES), *code, size=6)

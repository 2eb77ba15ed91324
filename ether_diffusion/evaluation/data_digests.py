"""Digests of data by content: what was trained on, or scored against, other files does not count as done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ether_diffusion.data.conditions import open_raw
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import Photo
from ether_diffusion.files import write_whole


def real_images_digest(pairs: Pairs) -> str:
    """SHA-256 of the names of pairs and the bytes of their images' files. Not of pixels: those of a JPEG depend on who
    decodes it."""
    return _digest(pairs, (pair.image for pair in pairs.pairs), [pair.name for pair in pairs.pairs])


def pairs_digest(pairs: Pairs, cache: Path | None = None) -> str:
    """SHA-256 of all that a training learns from pairs: names, captions, palette, the bytes of images and conditions.

    Args:
        cache: A folder that keeps digests by paths, sizes and times of change of the files, so that large sets are read
            once and then looked over: of two files that agree in all three, the content is taken to be the same.

    Raises:
        OSError: a file cannot be read.
    """
    palette = "" if pairs.palette is None else pairs.palette.tobytes().hex()
    told = [pairs.kind, pairs.as_stored, palette, [(pair.name, pair.caption) for pair in pairs.pairs]]
    files = [file for pair in pairs.pairs for file in (pair.image, pair.condition)]
    if cache is None:
        return _digest(pairs, files, told)
    looks = [file and (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    kept = cache / hashlib.sha256(json.dumps([told, looks]).encode()).hexdigest()
    if not kept.is_file():
        write_whole(kept, _digest(pairs, files, told))
    return kept.read_text(encoding="utf-8")


def photos_digest(photos: Iterable[Photo]) -> str:
    """SHA-256 of the photos' contents, in their order."""
    return hashlib.sha256(" ".join(photo.digest for photo in photos).encode()).hexdigest()


def _digest(pairs: Pairs, files: Iterable[Path | None], told: object) -> str:
    hashed = hashlib.sha256(json.dumps(told).encode())
    for file in files:
        content = b"" if file is None else _content(file, pairs)
        hashed.update(f" {file is None} {len(content)} ".encode() + content)
    return hashed.hexdigest()


def _content(file: Path, pairs: Pairs) -> bytes:
    """The file's bytes; of the PNG files of built-in scenes, which each machine packs with its own zlib, the pixels."""
    if not pairs.folder.startswith("builtin:") or file.suffix != ".png":
        return file.read_bytes()
    image = open_raw(file)
    return f"{image.mode} {image.size} ".encode() + image.tobytes()

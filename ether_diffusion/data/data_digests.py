"""Digests of data by content: training or scoring on other files is other work, wherever the files lie."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ether_diffusion.data.conditions import open_raw
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import Photo
from ether_diffusion.files import Digest, digest_of, digest_of_json, write_whole


def real_images_digest(pairs: Pairs) -> str:
    """SHA-256 of the names of pairs and the bytes of their image files.

    Not of pixels: those of a JPEG depend on the decoder.
    """
    return _digest(pairs, (pair.image for pair in pairs.pairs), [pair.name for pair in pairs.pairs])


def pairs_digest(pairs: Pairs, cache: Path | None = None) -> str:
    """SHA-256 of all that a training learns from pairs: names, captions, palette, the bytes of images and conditions.

    Args:
        cache: A folder that keeps digests by the paths, sizes and modification times of the files, so that large sets
            are read once. Files that agree in all three count as unchanged.

    Raises:
        OSError: a file cannot be read.
    """
    palette = "" if pairs.palette is None else pairs.palette.tobytes().hex()
    facts = [pairs.kind, pairs.ignore_exif, palette, [(pair.name, pair.caption) for pair in pairs.pairs]]
    files = [file for pair in pairs.pairs for file in (pair.image, pair.condition)]
    if cache is None:
        return _digest(pairs, files, facts)
    stats = [file and (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    kept = cache / digest_of_json([facts, stats])
    if not kept.is_file():
        write_whole(kept, _digest(pairs, files, facts))
    return kept.read_text(encoding="utf-8")


def photos_digest(photos: Iterable[Photo]) -> str:
    """SHA-256 of the digests of the photos, in their order."""
    return digest_of(" ".join(photo.digest for photo in photos))


def _digest(pairs: Pairs, files: Iterable[Path | None], facts: object) -> str:
    digest = Digest().update(json.dumps(facts))
    for file in files:
        content = b"" if file is None else _content(file, pairs)
        digest.update(f" {file is None} {len(content)} ", content)
    return digest.hex()


def _content(file: Path, pairs: Pairs) -> bytes:
    """The bytes of a file; the pixels of a built-in scene's PNG, because each machine compresses with its own zlib."""
    if not pairs.folder.startswith("builtin:") or file.suffix != ".png":
        return file.read_bytes()
    image = open_raw(file)
    return f"{image.mode} {image.size} ".encode() + image.tobytes()

"""PNG files that carry the settings they were generated with, and sheets of images."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .files import digest_of, whole_file

KEY, PIXELS = "ether_diffusion", "pixels_sha256"
MARGIN, INK, PAPER = 6, "#222222", "#ffffff"


def save_png(
    image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None, *, sync: bool = True
) -> Path:
    """Write a PNG whole or not at all, with settings as JSON in its text chunk `ether_diffusion`.

    Args:
        sync: As for `whole_file`; False for caches.
    """
    info = PngInfo()
    if settings is not None:
        info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    with whole_file(Path(path), sync=sync) as partial:
        image.save(partial, format="PNG", pnginfo=info)
    return Path(path)


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings in a PNG made by `save_png`; None if it has none or is not a complete image."""
    if not Path(path).is_file():  # no pipe is opened
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return json.loads(image.text[KEY])  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, SyntaxError, KeyError, AttributeError, ValueError, RecursionError):
        return None


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of size and pixels: the same for two files that look the same."""
    return digest_of(f"{image.size} ", image.convert("RGB").tobytes())


def save_cached_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG to a cache with a digest of its pixels among its settings, which `read_cached_png` compares."""
    save_png(image, path, {**settings, PIXELS: pixel_digest(image)}, sync=False)


def read_cached_png(path: Path) -> Image.Image | None:
    """The image in a PNG with settings, RGB; None if there is none, or its pixels are not those that were written."""
    settings = read_settings(path)
    if settings is None:
        return None
    with Image.open(path) as stored:
        image = stored.convert("RGB")
    # Earlier versions wrote no digest.
    return image if settings.get(PIXELS) in (None, pixel_digest(image)) else None


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int | None = None) -> Image.Image:
    """A grid of images on white, each row under its caption.

    Args:
        rows: (caption, images) a row. Rows may differ in length.
        cell: Side in pixels of the square that each image is fitted into; default: the largest side, at most 512.
    """
    images = [image for _, row in rows for image in row]
    if cell is None:
        cell = min(512, max((max(image.size) for image in images), default=64))
    columns = max((len(row) for _, row in rows), default=1)
    font = ImageFont.load_default(size=max(11, min(18, cell // 12)))
    width = MARGIN + columns * (cell + MARGIN)
    line = int(font.size * 1.35)  # pyright: ignore
    characters = max(12, int(width / (font.size * 0.52)))  # pyright: ignore
    captions = [textwrap.wrap(caption, characters) for caption, _ in rows]
    height = MARGIN + sum(len(lines) * line + cell + 2 * MARGIN for lines in captions)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for lines, (_, row) in zip(captions, rows, strict=True):
        for text in lines:
            draw.text((MARGIN, y), text, fill=INK, font=font)
            y += line
        y += MARGIN // 2
        for k, image in enumerate(row):
            page.paste(_fit(image, cell), (MARGIN + k * (cell + MARGIN), y))
        y += cell + MARGIN + MARGIN // 2
    return page


def _fit(image: Image.Image, cell: int) -> Image.Image:
    image = image.convert("RGB")
    scale = cell / max(image.size)
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # Enlarged images keep their pixels visible: blurring would show what is not there.
        image = image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return square

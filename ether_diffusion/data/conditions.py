"""Conditions: a label map, a painted map or any image that fixes the layout of an image; each becomes a hint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ether_diffusion.data.frames import Size
from ether_diffusion.data.palettes import ADE20K
from ether_diffusion.data.photos import decode, is_opaque, open_photo
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError

AS_IT_IS = "none"
"""The name of the preprocessor that does nothing: the image itself is the condition."""

ONE_CHANNEL = ("L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of images that hold one whole number a pixel."""


@dataclass(frozen=True)
class Condition:
    """A condition as the model sees it: `image`, 8-bit RGB, and what its file was read as, in words."""

    image: Image.Image
    taken_for: str
    discrete: bool
    """Colours stand for classes: no resampling may mix them."""

    def resized(self, size: Size) -> Image.Image:
        """Resize to exactly this (width, height): nearest neighbour if discrete, else bicubic with antialiasing."""
        if self.image.size == size:
            return self.image
        return self.image.resize(size, Image.Resampling.NEAREST if self.discrete else Image.Resampling.BICUBIC)


def read_condition(
    source: str | Path | Image.Image,
    *,
    palette: np.ndarray | None = None,
    preprocessor: str | Preprocessor | None = None,
) -> Condition:
    """Read a condition.

    Args:
        source: One channel of whole numbers is a label map, 0 for unlabelled and 1 to N; RGB with colours of the
            palette alone is a painted map.
        palette: (N + 1, 3) uint8, row 0 for unlabelled pixels; default ADE20K's, N = 150.
        preprocessor: Reads the source as a photo and computes the condition from it; "none": the image as it is. One
            that is given by name loads its weights for this call.

    Raises:
        UserError: Neither a label map nor painted with this palette, and no preprocessor named; a label out of range;
            a label map that went through JPEG; a file that cannot be read.
    """
    palette = ADE20K if palette is None else palette
    if preprocessor is not None:
        image = source.convert("RGB") if isinstance(source, Image.Image) else open_photo(Path(source))
        if preprocessor == AS_IT_IS:
            return Condition(image, "an image, as it is", discrete=False)
        if isinstance(preprocessor, str):
            preprocessor = Preprocessor(preprocessor)
        return Condition(preprocessor(image), f"a photo, through {preprocessor.name}", discrete=False)
    image = source if isinstance(source, Image.Image) else open_raw(Path(source))
    fault = map_fault(image, palette)
    if fault is not None:
        what = "the condition" if isinstance(source, Image.Image) else source
        raise UserError(f"{what}: {fault.detail}; {_OTHER_WAYS}")
    labels = labels_of(image, palette)
    if labels is None:
        return Condition(image.convert("RGB"), f"a map painted with {palette_name(palette)}", discrete=True)
    return Condition(paint(labels, palette), f"a label map of {len(palette) - 1} classes", discrete=True)


class MapFault(NamedTuple):
    """Why an image is no map: the kind of fault as a plural, for counts (`3 KIND`), and the details of this image."""

    kind: str
    detail: str


def map_fault(image: Image.Image, palette: np.ndarray) -> MapFault | None:
    """Why an image is neither a label map nor a map painted with this palette; None if it is one."""
    if image.format in ("JPEG", "MPO"):
        return MapFault("maps as JPEG, which changes labels", "a JPEG, which cannot be a label map; expected PNG")
    labels = labels_of(image, palette)
    if labels is not None:
        return _label_fault(labels, len(palette) - 1)
    if not is_opaque(image):
        return MapFault("maps with transparency", "a map with transparency; expected one channel, or opaque RGB")
    return _colour_fault(np.asarray(image.convert("RGB")), palette)


def labels_of(image: Image.Image, palette: np.ndarray) -> np.ndarray | None:
    """(H, W) of the labels in an image of one channel, in range or not; None where colours stand for them.

    In files with a colour table the indices are the labels, unless the table merely compresses a painted map.
    """
    if image.mode not in ONE_CHANNEL:
        return None
    if image.mode == "P":
        pixels = np.asarray(image.convert("RGB"))
        # Tables of greys only display the labels: label 120 shown as grey 120, the colour of ADE20K's wall, is no wall.
        if (pixels != pixels[..., :1]).any() and not off_palette(pixels, palette).any():
            return None
    return np.asarray(image).astype(np.int64)


def paint(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The RGB image of a map (H, W) of labels from 0 to N; the palette has N + 1 rows."""
    return Image.fromarray(palette[labels])


def palette_name(palette: np.ndarray) -> str:
    """The palette in words, for messages."""
    return "ADE20K's palette" if np.array_equal(palette, ADE20K) else f"the palette of {len(palette) - 1} classes"


def off_palette(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) of bool: which pixels of (H, W, 3) uint8 have no colour of the palette."""
    # A table of all colours takes 16 MB; sorting the pixels of a large map takes seconds.
    return ~np.isin(_packed(pixels), _packed(palette), kind="table")


def _packed(colours: np.ndarray) -> np.ndarray:
    red, green, blue = (colours[..., k].astype(np.int32) for k in range(3))
    return red << 16 | green << 8 | blue


def to_hint(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


_OTHER_WAYS = "name a preprocessor to compute a condition from a photo (canny, ...; none uses the image as it is)"


def open_raw(path: Path) -> Image.Image:
    """An image as it is stored: EXIF orientation ignored, no conversion. Raises UserError if it cannot be read."""
    return decode(path, lambda image: image)


def _label_fault(labels: np.ndarray, largest: int) -> MapFault | None:
    wrong = (labels < 0) | (labels > largest)
    if not wrong.any():
        return None
    y, x = np.argwhere(wrong)[0]
    detail = f"label {labels[y, x]} at x={x} y={y}, {wrong.mean():.1%} of the pixels out of range; "
    ignored = ", not 255" if (labels[wrong] == 255).all() else ""
    return MapFault("maps with labels out of range", f"{detail}expected 0 (unlabelled{ignored}) to {largest}")


def _colour_fault(pixels: np.ndarray, palette: np.ndarray) -> MapFault | None:
    wrong = off_palette(pixels, palette)
    if not wrong.any():
        return None
    y, x = np.argwhere(wrong)[0]
    detail = f"colour {tuple(pixels[y, x].tolist())} at x={x} y={y}, {wrong.mean():.1%} of the pixels not in "
    grey = " (grey in three channels: labels belong in one)" if (pixels == pixels[..., :1]).all() else ""
    return MapFault("maps with colours off the palette", f"{detail}{palette_name(palette)}{grey}")

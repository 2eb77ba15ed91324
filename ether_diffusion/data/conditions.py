"""Conditions: what a picture's layout is taken from. A label map, a painted map, or any image; each becomes a hint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ether_diffusion.data.frames import Frame, Size, scaled_size
from ether_diffusion.data.palettes import ADE20K
from ether_diffusion.data.photos import open_photo
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError

AS_IT_IS = "none"
"""The preprocessor that does nothing: the image itself is the condition."""

ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of images that hold one whole number a pixel."""


@dataclass(frozen=True)
class Condition:
    """A condition as the model sees it: `image`, 8-bit RGB, and what its file was taken for, in words."""

    image: Image.Image
    taken_for: str
    discrete: bool
    """Colours stand for classes: no resampling may mix them."""

    def resized(self, size: Size) -> Image.Image:
        """To exactly this (width, height): nearest neighbour if discrete, else bicubic with antialiasing."""
        if self.image.size == size:
            return self.image
        return self.image.resize(size, Image.Resampling.NEAREST if self.discrete else Image.Resampling.BICUBIC)


def read_condition(
    source: str | Path | Image.Image,
    *,
    palette: np.ndarray | None = None,
    preprocessor: str | Preprocessor | None = None,
) -> Condition:
    """Reads a condition and says what it was taken for.

    Args:
        source: One channel of whole numbers is a label map, 0 for unlabelled and 1 to N; RGB with colours of the
            palette alone is a painted map.
        palette: (N + 1, 3) uint8, row 0 for what has no label; default ADE20K's, N = 150.
        preprocessor: Takes the source for a photo of which it makes the condition; "none": the image as it is. One
            that is given by name loads its weights for this call.

    Raises:
        UserError: Neither a label map nor painted with this palette, and no preprocessor named; a label out of range;
            a label map that went through JPEG; a file that cannot be read.
    """
    palette = ADE20K if palette is None else palette
    what = "the condition" if isinstance(source, Image.Image) else str(source)
    if preprocessor is not None:
        image = source.convert("RGB") if isinstance(source, Image.Image) else open_photo(Path(source))
        if preprocessor == AS_IT_IS:
            return Condition(image, "an image, as it is", discrete=False)
        maker = Preprocessor(preprocessor) if isinstance(preprocessor, str) else preprocessor
        return Condition(maker(image), f"a photo, through {maker.name}", discrete=False)
    image = source if isinstance(source, Image.Image) else open_raw(Path(source))
    if image.format in ("JPEG", "MPO"):
        raise UserError(f"{what}: a JPEG, which cannot be a label map; {_OTHER_WAYS}")
    if image.mode in ONE_CHANNEL:
        labels = np.asarray(image).astype(np.int64)
        _check_labels(labels, palette, what)
        return Condition(paint(labels, palette), f"a label map of {len(palette) - 1} classes", discrete=True)
    painted = _opaque(image, what)
    _check_colours(np.asarray(painted), palette, what)
    return Condition(painted, f"a map painted with {palette_name(palette)}", discrete=True)


def paint(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The RGB image of a map (H, W) of whole numbers from 0 to N, all of which the palette has."""
    return Image.fromarray(palette[labels])


def palette_name(palette: np.ndarray) -> str:
    return "ADE20K's palette" if np.array_equal(palette, ADE20K) else f"the palette of {len(palette) - 1} classes"


def hint_tensor(condition: Condition, size: Size) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1] of `size`, (width, height): scaled to cover it, proportions kept, cut in the centre.

    A discrete condition keeps its colours exactly.
    """
    scaled = scaled_size(condition.image.size, size)
    return to_hint(Frame.at(scaled, size).cut(condition.resized(scaled)))


def to_hint(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


_OTHER_WAYS = "name a preprocessor to make a condition of a photo (canny, ...; none takes the image as it is)"


def open_raw(path: Path) -> Image.Image:
    """An image as it is stored: no EXIF orientation, no conversion. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise UserError(f"{path}: not an image that can be read: {str(error).splitlines()[0]}") from None


def _opaque(image: Image.Image, what: str) -> Image.Image:
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise UserError(f"{what}: a map with transparency; expected one channel of labels, or opaque RGB")
    return image.convert("RGB")


def _check_labels(labels: np.ndarray, palette: np.ndarray, what: str) -> None:
    largest = len(palette) - 1
    wrong = (labels < 0) | (labels > largest)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise UserError(
            f"{what}: label {labels[y, x]} at x={x} y={y}, {wrong.mean():.1%} of the pixels out of range; expected 0 "
            f"(unlabelled) to {largest}; {_OTHER_WAYS}"
        )


def _check_colours(pixels: np.ndarray, palette: np.ndarray, what: str) -> None:
    wrong = off_palette(pixels, palette)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        colour = tuple(pixels[y, x].tolist())
        raise UserError(
            f"{what}: colour {colour} at x={x} y={y}, {wrong.mean():.1%} of the pixels not in "
            f"{palette_name(palette)}; {_OTHER_WAYS}"
        )


def off_palette(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) of bool: which pixels of (H, W, 3) uint8 have no colour of the palette."""
    weights = np.array([1 << 16, 1 << 8, 1])
    known, index = np.unique(pixels.astype(np.int64) @ weights, return_inverse=True)
    return ~np.isin(known, palette.astype(np.int64) @ weights)[index].reshape(pixels.shape[:2])

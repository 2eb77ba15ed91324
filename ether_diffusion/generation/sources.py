"""Conditions to generate under: the pairs of a data set, or a user's files; each with a prompt, a size and a digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.data.condition_kind import ConditionKind
from ether_diffusion.data.conditions import AS_IT_IS, Condition, read_condition
from ether_diffusion.data.frames import Frame, Size, scaled_size
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import list_images
from ether_diffusion.data.pairs import Pair, Pairs
from ether_diffusion.data.photos import Photo
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.files import short_digest
from ether_diffusion.input_files import check_file
from ether_diffusion.models.bases import check_multiple

from .jobs import slug

LONGEST = 2
"""Largest ratio of the sides of an image that takes its condition's shape; the rest is cut off."""


@dataclass(frozen=True)
class Opened:
    """The condition as the model gets it, 8-bit RGB of the image's size; and the real photo, if there is one."""

    condition: Image.Image
    photo: Image.Image | None = None


@dataclass(frozen=True)
class Source:
    """A condition, and the prompt for an image that follows it."""

    name: str
    """The condition's."""
    file: str
    """The path of the image in its folder, without `.png`."""
    prompt: str
    size: Size
    digest: str
    """The digest of what the hint is made from."""
    open: Callable[[], Opened]
    """Reads the condition when it is needed: those of a data set do not fit into memory."""


def pair_sources(pairs: Pairs, resolution: int) -> list[Source]:
    """The pairs of a data set in their order, each with its own caption: squares cut in the centre, as for training."""
    dataset = ControllableDataset(pairs, resolution=resolution)

    def open_pair(k: int) -> Opened:
        example = dataset.example(k)
        return Opened(example["condition"], example.get("image"))

    size = (resolution, resolution)
    return [
        Source(pair.name, f"images/{pair.name}", pair.caption, size, _pair_digest(pair, pairs), partial(open_pair, k))
        for k, pair in enumerate(pairs.pairs)
    ]


def find_conditions(path: str | Path) -> list[Path]:
    """A file, or the images of a folder in the order of their names.

    Raises:
        UserError: nothing there, or two files that differ in their suffix alone.
    """
    path = Path(path)
    if not path.is_dir():
        return [check_file(path)]
    files = list(list_images(path).values())
    if not files:
        raise UserError(f"--condition {path}: no image in it; expected label maps, painted maps, or photos.")
    return files


def read_conditions(
    files: Sequence[Path], *, kind: ConditionKind | None, preprocessor: str | None = None
) -> Iterator[tuple[Path, Condition]]:
    """Read conditions one by one.

    Args:
        kind: What the run was trained to see: the palette of maps, and what is done with files if `preprocessor` is not
            given. None: maps in ADE20K's colours.
        preprocessor: Takes the files for photos that it makes conditions of; `none`: for conditions as they are.

    Raises:
        UserError: as `read_condition`.
    """
    kind = kind or ConditionKind()
    name = preprocessor or kind.preprocessor
    made = name if name in (None, AS_IT_IS) else Preprocessor(name)
    for file in files:
        yield file, read_condition(file, palette=kind.palette, preprocessor=made)


def file_sources(file: Path, condition: Condition, prompts: Sequence[str], size: Size) -> list[Source]:
    """A file's condition, scaled to cover `size` and cut in the centre, with each of the prompts."""
    scaled = scaled_size(condition.image.size, size)
    opened = Opened(Frame.at(scaled, size).cut(condition.resized(scaled)))
    digest = short_digest(opened.condition.tobytes())
    return [
        Source(file.stem, f"{file.stem}-{slug(prompt)}", prompt, size, digest, lambda: opened) for prompt in prompts
    ]


def fitting_size(condition: Size, *, resolution: int, multiple: int, height: int | None, width: int | None) -> Size:
    """The size of an image under a condition: (width, height) in pixels.

    Sides that are not given follow the condition's proportions, as far as multiples of `multiple` can; if neither is,
    the short one is `resolution`, and the long one at most `LONGEST` times that.

    Raises:
        UserError: a side that is not a multiple of `multiple`.
    """
    for name, side in (("--height", height), ("--width", width), ("--resolution", resolution)):
        if side is not None:
            check_multiple(side, multiple, name)
    ratio = condition[0] / condition[1]
    if height is None and width is None:
        ratio = min(max(ratio, 1 / LONGEST), LONGEST)
        height, width = (resolution, None) if ratio >= 1 else (None, resolution)

    def rounded(side: float) -> int:
        return max(1, round(side / multiple)) * multiple

    if height is None:
        assert width is not None
        return width, rounded(width / ratio)
    return width or rounded(height * ratio), height


def _pair_digest(pair: Pair, pairs: Pairs) -> str:
    """The digest of the file that the hint is made from, and of how it is made."""
    file = pair.condition or pair.image
    assert file is not None
    palette = b"" if pairs.palette is None else np.ascontiguousarray(pairs.palette).tobytes()
    made = f"{pairs.kind} {pairs.ignore_exif} {Photo(file.name, file).digest} "
    return short_digest(made, palette)

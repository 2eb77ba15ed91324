"""A note on photos, pairs and conditions that are not of the world of the base `tiny`, where images and scores mean
nothing: training, generating and scoring print it once.

The world's own are renders of 64 x 64 pixels, of one of its classes, or maps of its labels.
"""

from __future__ import annotations

from collections.abc import Collection

from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scenes import CLASSES, SIZE

from .condition_kind import ConditionKind
from .frames import Size
from .pairs import Pairs
from .photos import Photo

LOOKED_AT = 8
"""So many pairs of a data set are opened: it may hold thousands."""


def photos_note(source: str, sizes: Collection[Size], class_name: str) -> str | None:
    """The note on a subject's photos; None if they are of the world."""
    return _note(source, sizes, "" if class_name in CLASSES else f"class {class_name!r}")


def pairs_note(pairs: Pairs) -> str | None:
    """The note on a data set, by its first images; by its conditions, if it has no images."""
    if pairs.pairs[0].image is None and pairs.names == LABELS[1:]:
        return None
    files = [pair.image or pair.condition for pair in pairs.pairs[:LOOKED_AT]]
    return _note(pairs.folder, {Photo(file.name, file).size for file in files if file is not None})


def conditions_note(source: str, sizes: Collection[Size], kind: ConditionKind | None) -> str | None:
    """The note on a user's conditions for a run that was trained on this kind; maps of the world may have any size."""
    return None if kind is not None and kind.names == LABELS[1:] else _note(source, sizes)


def _note(source: str, sizes: Collection[Size], what: str = "") -> str | None:
    other = set(sizes) - {(SIZE, SIZE)}
    if not other and not what:
        return None
    found = what or "{} x {} pixels".format(*max(other))
    return (
        f"{source} ({found}) is not of the world of the base 'tiny', rendered scenes of {SIZE} x {SIZE} pixels: "
        "neither base nor scorers know such things, and images and scores mean nothing. Train on a real base"
    )

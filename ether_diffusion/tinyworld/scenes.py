"""The contents of the miniature: settings, classes and colours, and scenes sampled from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ether_diffusion.errors import UserError
from ether_diffusion.randomness import derive_seed

SIZE = 64  # pixels per side

RGB = tuple[int, int, int]
Split = Literal["train", "held_out"]

SETTINGS: tuple[str, ...] = ("meadow", "snow", "beach", "night", "street", "water", "desert", "room")

COLOURS: dict[str, RGB] = {
    "red": (222, 44, 48),
    "orange": (246, 136, 28),
    "yellow": (250, 212, 40),
    "green": (48, 168, 72),
    "blue": (44, 104, 224),
    "purple": (142, 68, 190),
    "pink": (248, 132, 184),
    "brown": (142, 88, 48),
    "white": (248, 248, 246),
    "black": (48, 48, 58),
}


@dataclass(frozen=True)
class Kind:
    """A class: its colours, and its width and height as shares of its size (the larger one is 1)."""

    colours: tuple[str, ...]
    width: float
    height: float


KINDS: dict[str, Kind] = {
    "tree": Kind(("green", "red", "orange", "yellow", "pink", "purple"), 0.72, 1),
    "house": Kind(("red", "blue", "yellow", "white", "green", "pink", "orange"), 0.92, 1),
    "car": Kind(("red", "blue", "yellow", "green", "orange", "purple", "black", "white", "pink"), 1, 0.58),
    "boat": Kind(("red", "blue", "yellow", "white", "green", "brown", "purple"), 1, 0.94),
    "cat": Kind(("orange", "black", "white", "brown", "pink", "blue"), 0.82, 1),
    "dog": Kind(("brown", "white", "black", "yellow", "orange", "blue"), 1, 0.88),
    "toy": Kind(("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown"), 0.78, 1),
    "ball": Kind(("red", "blue", "yellow", "green", "orange", "purple", "pink", "white"), 1, 1),
    "star": Kind(("yellow", "red", "blue", "green", "pink", "purple", "orange"), 1, 1),
    "flower": Kind(("red", "yellow", "pink", "purple", "white", "blue", "orange"), 0.62, 1),
    "mushroom": Kind(("red", "brown", "orange", "purple", "blue", "yellow"), 0.88, 1),
    "cup": Kind(("white", "red", "blue", "green", "yellow", "pink", "black"), 1, 0.92),
}
CLASSES: tuple[str, ...] = tuple(KINDS)

BIG, SMALL = 0.57, 0.3  # captions call a thing of at least BIG big, one below SMALL small


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are shares of the image's side.

    Attributes:
        kind: One of `CLASSES`.
        colour: One of `COLOURS`.
        place: "left", "middle" or "right" in the image.
        size: The length of its larger side.
        x, y: Its position: the middle of its foot, from the image's upper left corner.
        flip: Whether it faces left, where its class has a side view.
        tilt: Degrees by which it leans to the right.
        look: The seed of the parts that vary within a class: ears, windows, patterns.
        individual: The name of a subject, which replaces the look of its class; `sample_scene` never sets it.
        pose: The pose of a subject, which varies from photo to photo, in [0, 1].
    """

    kind: str
    colour: str
    place: str
    size: float
    x: float
    y: float
    flip: bool = False
    tilt: float = 0.0
    look: int = 0
    individual: str | None = None
    pose: float = 0.0

    @property
    def size_word(self) -> str:
        """ "big", "small", or "" for neither."""
        return "big" if self.size >= BIG else "small" if self.size < SMALL else ""


@dataclass(frozen=True)
class Scene:
    """A setting with one to three things of different classes, the main one first; `seed` places the details."""

    setting: str
    things: tuple[Thing, ...]
    seed: int = 0


def is_held_out(kind: str, colour: str, setting: str) -> bool:
    """Whether pretraining never sees this class in this colour and setting.

    This holds for a fifth of the combinations, as in a Latin square: every class has one or two such colours in every
    setting, and every coloured class one or two such settings. `colour` is one of `KINDS[kind].colours`.
    """
    return (CLASSES.index(kind) + 2 * KINDS[kind].colours.index(colour) + 3 * SETTINGS.index(setting)) % 5 == 0


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of a seed, a function of its arguments alone.

    Args:
        seed: Any integer of at least 0.
        split: "train": no combination is held out (see `is_held_out`); "held_out": the main thing's combination is.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"split {split!r}; expected 'train' or 'held_out'")
    dice = Dice(derive_seed(seed, f"tinyworld/{split}"))
    setting = dice.pick(SETTINGS)
    count = dice.pick((1, 1, 1, 2, 2, 3))
    kinds = dice.shuffled(CLASSES)[:count]
    colours = []
    for position, kind in enumerate(kinds):
        wanted = split == "held_out" and position == 0
        choices = [colour for colour in KINDS[kind].colours if is_held_out(kind, colour, setting) == wanted]
        colours.append(dice.pick(choices))
    things = _arranged(dice, kinds, colours)
    return Scene(setting, tuple(things), derive_seed(seed, f"tinyworld/{split}/details") % 2**31)


def sample_view(seed: int) -> Scene:
    """View `seed % 2` of individual `seed // 2`: the same class, colour and look in another place and size."""
    individual = sample_scene(seed // 2).things[0]
    dice = Dice(derive_seed(seed, "tinyworld/view"))
    settings = [place for place in SETTINGS if not is_held_out(individual.kind, individual.colour, place)]
    size = dice.between(0.36, 0.65)
    half_width = size * KINDS[individual.kind].width / 2
    thing = Thing(
        individual.kind,
        individual.colour,
        individual.place,
        size,
        dice.between(half_width, 1 - half_width),
        max(dice.between(0.76, 0.94), size * KINDS[individual.kind].height + 0.04),
        flip=dice.chance(0.5),
        tilt=dice.between(-4, 4),
        look=individual.look,
    )
    return Scene(dice.pick(settings), (thing,), derive_seed(seed, "tinyworld/view/details") % 2**31)


_Item = TypeVar("_Item")


class Dice:
    """Random choices that stay the same across Python's versions: all come from `random.Random.random`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def between(self, low: float, high: float) -> float:
        """Uniform, in steps of a ten thousandth, so that scenes print briefly."""
        return round(low + (high - low) * self._random(), 4)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def number(self, stop: int) -> int:
        """0 … stop - 1."""
        return int(self._random() * stop)

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One item, each with the same probability."""
        return items[self.number(len(items))]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """The items in a random order."""
        keys = [self._random() for _ in items]
        return [items[position] for position in sorted(range(len(items)), key=keys.__getitem__)]


_MAIN = {1: (0.46, 0.65), 2: (0.42, 0.52), 3: (0.4, 0.42)}
_OTHERS = {1: (0.0, 0.0), 2: (0.24, 0.4), 3: (0.23, 0.28)}
_EDGE = 0.02  # free space along the image's edges


def _arranged(dice: Dice, kinds: Sequence[str], colours: Sequence[str]) -> list[Thing]:
    """Things side by side in a random order, with gaps: no thing hides another."""
    count = len(kinds)
    sizes = [dice.between(*(_OTHERS if position else _MAIN)[count]) for position in range(count)]
    widths = [size * KINDS[kind].width for size, kind in zip(sizes, kinds, strict=True)]
    order = dice.shuffled(range(count))
    slack = 1 - 2 * _EDGE - sum(widths)
    cuts = sorted(dice.between(0, slack) for _ in kinds)
    things: dict[int, Thing] = {}
    used = 0.0
    for rank, position in enumerate(order):
        x = _EDGE + cuts[rank] + used + widths[position] / 2
        used += widths[position]
        height = sizes[position] * KINDS[kinds[position]].height
        things[position] = Thing(
            kinds[position],
            colours[position],
            _place(x, rank, count),
            sizes[position],
            round(x, 4),
            max(dice.between(0.76, 0.94), height + 2 * _EDGE),
            flip=dice.chance(0.5),
            tilt=dice.between(-4, 4),
            look=dice.number(2**16),
        )
    return [things[position] for position in range(count)]


def _place(x: float, rank: int, count: int) -> str:
    if count == 1:
        return "left" if x < 0.42 else "right" if x > 0.58 else "middle"
    return (("left", "right") if count == 2 else ("left", "middle", "right"))[rank]

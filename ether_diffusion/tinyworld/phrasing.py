"""Captions: one scene in many phrasings, from a small closed vocabulary of lowercase words."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import NamedTuple

from ether_diffusion.randomness import derive_seed
from ether_diffusion.tinyworld.scenes import CLASSES, COLOURS, Dice, Scene, Thing

# Phrasings by the number of things. a, b, c: the things, the main one first; bare: the main one without its article;
# left, middle, right: the things by place; place: the main one's place; where and scene: two ways to name the setting.
_TRAINING: dict[int, tuple[str, ...]] = {
    1: (
        "{a} {where}",
        "a photo of {a} {where}",
        "a picture of {a} {where}",
        "a photo of {a}",
        "a photo of {bare}",
        "{a}",
        "{scene} with {a}",
        "a photo of {scene} with {a}",
        "{a} {place} {where}",
        "a photo of {a} {place}",
        "{scene} with {a} {place}",
    ),
    2: (
        "{a} and {b} {where}",
        "a photo of {a} and {b} {where}",
        "{a} beside {b} {where}",
        "a photo of {a} beside {b} {where}",
        "a picture of {a} next to {b} {where}",
        "{a} next to {b}",
        "a photo of {a} with {b}",
        "{left} on the left and {right} on the right {where}",
        "{scene} with {a} and {b}",
        "{scene} with {left} on the left and {right} on the right",
        "{left} to the left of {right} {where}",
        "{right} to the right of {left} {where}",
    ),
    3: (
        "{a} and {b} and {c} {where}",
        "a photo of {a} with {b} and {c} {where}",
        "{a} beside {b} and {c} {where}",
        "{middle} between {left} and {right} {where}",
        "a photo of {middle} between {left} and {right}",
        "a picture of {a} and {b} and {c}",
        "{scene} with {a} and {b} and {c}",
        "{left} on the left and {middle} in the middle and {right} on the right {where}",
    ),
}
# Sentences that pretraining never sees, made of words that it does see.
_HELD_OUT: dict[int, tuple[str, ...]] = {
    1: ("{where} {a}", "a photo with {a} {where}", "a picture of {scene} and {a}"),
    2: ("{a} with {b} {where}", "a picture of {scene} with {a} next to {b}", "{where} {left} to the left of {right}"),
    3: ("{scene} with {middle} between {left} and {right}", "{where} {a} next to {b} and {c}"),
}

WHERE: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "in the meadow", "on the grass"),
    "snow": ("in the snow", "in a snowy field"),
    "beach": ("on the beach", "on a beach"),
    "night": ("at night", "under the moon"),
    "street": ("on a street", "on the street", "in the city"),
    "water": ("in the water", "in the sea"),
    "desert": ("in the desert", "in a desert"),
    "room": ("in a room", "in the room", "indoors"),
}
SCENE: dict[str, tuple[str, ...]] = {
    "meadow": ("a meadow", "a green meadow"),
    "snow": ("a snowy field", "the snow"),
    "beach": ("a beach", "the beach"),
    "night": ("a moonlit night", "the night"),
    "street": ("a street", "a city street"),
    "water": ("the sea", "the water"),
    "desert": ("a desert", "the desert"),
    "room": ("a room", "the room"),
}
UNKNOWN = 0.12  # share of training captions with an unknown word
_PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


class _Style(NamedTuple):
    """Which adjectives captions have, and the cumulative share of captions up to this style."""

    limit: float
    size: bool
    colour: bool


_STYLES = (_Style(0.4, False, True), _Style(0.7, True, True), _Style(1, False, False))


def caption(scene: Scene, seed: int, held_out: bool = False) -> str:
    """One caption, a function of its arguments alone: in a phrasing for training, or in a held-out one."""
    dice = Dice(derive_seed(seed, "tinyworld/caption"))
    template = dice.pick((_HELD_OUT if held_out else _TRAINING)[len(scene.things)])
    share = dice.between(0, 1)
    style = next(style for style in _STYLES if share <= style.limit)
    return dice.pick(list(_variants(template, scene, style)))


def training_caption(scene: Scene, seed: int) -> str:
    """A caption for pretraining: in some, one thing has a made-up name, as in "a xvq dog", which changes no image."""
    text, dice = caption(scene, seed), Dice(seed)
    if not dice.chance(UNKNOWN):
        return text
    words = text.split()
    if places := [k for k, word in enumerate(words) if word.strip(",.") in CLASSES]:
        name = "".join(dice.pick(string.ascii_lowercase) for _ in range(3))
        words.insert(dice.pick(places), name)
    return " ".join(words)


def _variants(template: str, scene: Scene, style: _Style) -> Iterator[str]:
    """A phrasing filled in, with every way to name the setting where it has a place for it."""
    nouns = [_noun(thing, style) for thing in scene.things]
    words = {letter: _article(noun) for letter, noun in zip("abc", nouns, strict=False)}
    words |= {thing.place: _article(noun) for thing, noun in zip(scene.things, nouns, strict=True)}
    words |= {"bare": nouns[0], "place": _PLACE[scene.things[0].place]}
    for where in WHERE[scene.setting] if "{where}" in template else ("",):
        for place in SCENE[scene.setting] if "{scene}" in template else ("",):
            yield template.format(**words, where=where, scene=place)


def _noun(thing: Thing, style: _Style) -> str:
    size, colour = thing.size_word if style.size else "", thing.colour if style.colour else ""
    return " ".join(word for word in (size, colour, thing.kind) if word)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_TEXTS = [text for table in (_TRAINING, _HELD_OUT, WHERE, SCENE) for texts in table.values() for text in texts]
_WORDS = " ".join([*_TEXTS, *_PLACE.values(), *CLASSES, *COLOURS, "a an big small"]).split()
# Every word of every caption, in alphabetical order.
VOCABULARY: tuple[str, ...] = tuple(sorted({word for word in _WORDS if not word.startswith("{")}))

"""Unknown words in captions: a made-up name before a class does not change the image."""

from __future__ import annotations

import string

from ether_diffusion.tinyworld.phrasing import caption
from ether_diffusion.tinyworld.scenes import CLASSES, Dice, Scene

UNKNOWN = 0.12  # share of captions with an unknown word


def training_caption(scene: Scene, seed: int) -> str:
    """A caption in a training phrasing; in some, one thing has a made-up name, as in "a xvq dog"."""
    text, dice = caption(scene, seed), Dice(seed)
    if not dice.chance(UNKNOWN):
        return text
    words = text.split()
    places = [k for k, word in enumerate(words) if word.strip(",.") in CLASSES]
    if places:
        name = "".join(dice.pick(string.ascii_lowercase) for _ in range(3))
        words.insert(dice.pick(places), name)
    return " ".join(words)

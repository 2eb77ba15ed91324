"""Every caption that a scene of the miniature can have: the set that `phrasing.caption` chooses from."""

from __future__ import annotations

from ether_diffusion.tinyworld import phrasing
from ether_diffusion.tinyworld.scenes import Scene


def captions(scene: Scene, held_out: bool | None = None) -> list[str]:
    """Each caption once: phrasings x ways to name the setting x adjectives.

    Args:
        held_out: True: only phrasings that pretraining never sees; False: only the others; None: both.
    """
    found: dict[str, None] = {}
    for phrasings, held in ((phrasing._TRAINING, False), (phrasing._HELD_OUT, True)):
        if held_out in (None, held):
            for template in phrasings[len(scene.things)]:
                for style in phrasing._STYLES:
                    found |= dict.fromkeys(phrasing._variants(template, scene, style))
    return list(found)

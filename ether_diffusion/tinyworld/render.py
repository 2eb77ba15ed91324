"""Scenes rendered as an image and a label map."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ether_diffusion.tinyworld import backgrounds as settings
from ether_diffusion.tinyworld import individuals, things
from ether_diffusion.tinyworld.brush import SIDE, Canvas, Pen, Region, dark, oval, polygon
from ether_diffusion.tinyworld.scenes import CLASSES, COLOURS, KINDS, Dice, Scene, Thing

LABELS: tuple[str, ...] = settings.SURFACES + CLASSES

# Spread over the cube of colours, so that any two of the 24 differ clearly.
PALETTE: np.ndarray = np.array(
    [
        (0, 0, 0), (120, 200, 255), (80, 190, 60), (230, 240, 255), (240, 210, 130), (20, 80, 200),
        (110, 110, 110), (190, 180, 170), (150, 90, 90), (110, 110, 180), (255, 235, 200), (160, 100, 40),
        (0, 100, 0), (200, 40, 40), (255, 0, 160), (0, 220, 220), (255, 140, 0), (110, 50, 0),
        (150, 0, 220), (255, 255, 0), (0, 255, 120), (255, 150, 190), (90, 0, 60), (0, 120, 120),
    ],
    dtype=np.uint8,
)  # fmt: skip

_OUTLINE = 3  # samples


def render(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Render a scene: the same bits for the same scene on every machine.

    Returns:
        The image, RGB, 64 x 64, antialiased; and its labels (64, 64) uint8, indices of `LABELS`: the label of most of
        each pixel. 0 is everything without a name: sun and moon, a shell, a cactus, a window and a picture on a wall.
    """
    canvas = Canvas()
    settings.PAINTERS[scene.setting](canvas, Dice(scene.seed))
    colour, share = settings.CONTACTS.get(scene.setting, settings.SHADOW)
    for thing in scene.things:
        canvas.tint(_contact(thing), colour, share)
    for thing in sorted(scene.things, key=lambda thing: thing.y):  # from far to near
        figure = Canvas()
        label = LABELS.index(thing.kind)
        pen = Pen(figure, label, thing.x, thing.y, thing.size, flip=thing.flip, tilt=thing.tilt)
        if thing.individual is None:
            things.PAINTERS[thing.kind](pen, COLOURS[thing.colour], Dice(thing.look))
        else:
            individuals.PAINTERS[thing.individual](pen, thing.pose)
        shape = figure.labelled()
        canvas.paint(shape.grown(_OUTLINE), dark(COLOURS[thing.colour], 0.62), label)
        canvas.lay(figure, shape)
    return Image.fromarray(canvas.pixels()), canvas.label_map(len(LABELS))


def _contact(thing: Thing) -> Region:
    """The ground that a thing shades, or the ripple around it."""
    half = thing.size * KINDS[thing.kind].width * 0.5
    return polygon([(x * SIDE, y * SIDE) for x, y in oval(thing.x, thing.y - 0.005, half, half * 0.22)])

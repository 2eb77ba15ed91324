"""The twelve classes: how each is painted, in one colour, with parts that vary from thing to thing."""

from __future__ import annotations

from collections.abc import Callable

from ether_diffusion.tinyworld.brush import Pen, dark, light, mix, oval, turned
from ether_diffusion.tinyworld.scenes import RGB, Dice

INK, WHITE, CREAM = (30, 30, 42), (255, 255, 255), (255, 240, 212)
WOOD, LEAF, GLASS, GOLD, ROSE = (124, 80, 46), (64, 150, 66), (176, 220, 246), (255, 214, 70), (244, 140, 152)


def tree(pen: Pen, colour: RGB, dice: Dice) -> None:
    pen.polygon([(-0.1, 0), (0.1, 0), (0.06, 0.45), (-0.06, 0.45)], WOOD)
    if dice.chance(0.4):  # a fir
        for half, low, high in ((0.36, 0.2, 0.56), (0.3, 0.42, 0.78), (0.22, 0.64, 1)):
            pen.polygon([(-half, low), (half, low), (0, high)], dark(colour, 0.12))
            pen.polygon([(-half, low), (-half * 0.1, low), (0, high)], colour)
            pen.polygon([(-half * 0.8, low), (-half * 0.5, low), (0, high)], light(colour, 0.2))
        return
    for x, y, radius in (
        (-0.19, 0.52, 0.17),
        (0.19, 0.52, 0.17),
        (0, 0.46, 0.2),
        (-0.12, 0.72, 0.2),
        (0.13, 0.7, 0.2),
        (0, 0.82, 0.18),
    ):
        pen.ellipse(x, y, radius, radius, colour)
    for x, y, radius in ((0.16, 0.46, 0.1), (0.2, 0.62, 0.08), (-0.04, 0.4, 0.08)):
        pen.ellipse(x, y, radius, radius * 0.8, dark(colour, 0.2))
    for x, y, radius in ((-0.14, 0.78, 0.09), (-0.22, 0.56, 0.07), (0.06, 0.64, 0.06)):
        pen.ellipse(x, y, radius, radius * 0.8, light(colour, 0.3))


def house(pen: Pen, colour: RGB, dice: Dice) -> None:
    roof = dice.pick(((116, 66, 60), (88, 84, 108)))
    side = dice.pick((-1, 1))
    pen.box(side * 0.26 - 0.06, 0.62, side * 0.26 + 0.06, 0.94, (150, 100, 84))
    pen.box(-0.4, 0, 0.4, 0.58, colour)
    for y in (0.1, 0.22, 0.34, 0.46):
        pen.box(-0.4, y, 0.4, y + 0.022, dark(colour, 0.16))
    pen.polygon([(-0.46, 0.54), (0.46, 0.54), (0, 1)], roof)
    pen.polygon([(-0.46, 0.54), (0.46, 0.54), (0.4, 0.6), (-0.4, 0.6)], dark(roof))
    pen.ellipse(0, 0.7, 0.075, 0.075, WHITE)
    pen.ellipse(0, 0.7, 0.05, 0.05, GOLD)
    door = -side * 0.17
    pen.box(door - 0.12, 0, door + 0.12, 0.38, WHITE)
    pen.box(door - 0.09, 0, door + 0.09, 0.35, (110, 66, 42))
    pen.ellipse(door + 0.05, 0.17, 0.022, 0.022, GOLD)
    window = side * 0.19
    pen.box(window - 0.13, 0.16, window + 0.13, 0.42, WHITE)
    pen.box(window - 0.1, 0.19, window + 0.1, 0.39, GOLD)
    pen.box(window - 0.014, 0.19, window + 0.014, 0.39, WHITE)
    pen.box(window - 0.1, 0.276, window + 0.1, 0.304, WHITE)


def car(pen: Pen, colour: RGB, dice: Dice) -> None:
    long_roof = dice.chance(0.4)
    back = -0.42 if long_roof else -0.28
    pen.polygon([(back, 0.32), (back + 0.07, 0.57), (0.14, 0.57), (0.3, 0.32)], colour)
    pen.polygon([(back + 0.06, 0.34), (back + 0.11, 0.52), (-0.06, 0.52), (-0.06, 0.34)], GLASS)
    pen.polygon([(-0.01, 0.34), (-0.01, 0.52), (0.12, 0.52), (0.23, 0.34)], GLASS)
    pen.polygon([(0.03, 0.52), (0.09, 0.52), (0.06, 0.34), (0, 0.34)], light(GLASS, 0.6))
    pen.rounded(-0.5, 0.1, 0.5, 0.36, 0.09, colour)
    pen.box(-0.49, 0.12, 0.49, 0.18, dark(colour, 0.28))
    pen.box(-0.44, 0.3, 0.4, 0.33, light(colour, 0.4))
    pen.box(-0.06, 0.19, -0.045, 0.32, dark(colour, 0.35))
    pen.ellipse(0.45, 0.27, 0.045, 0.05, GOLD)
    pen.box(-0.5, 0.22, -0.45, 0.3, (240, 70, 60))
    for x in (-0.28, 0.28):
        pen.ellipse(x, 0.125, 0.135, 0.125, INK)
        pen.ellipse(x, 0.125, 0.07, 0.065, (206, 208, 214))
        pen.ellipse(x, 0.125, 0.03, 0.03, (110, 112, 122))


def boat(pen: Pen, colour: RGB, dice: Dice) -> None:
    pen.box(-0.03, 0.2, 0.02, 0.9, WOOD)
    sail = dice.pick((WHITE, CREAM))
    pen.polygon([(0.04, 0.36), (0.04, 0.86), (0.42, 0.36)], sail)
    pen.polygon([(0.04, 0.48), (0.04, 0.6), (0.24, 0.6), (0.33, 0.48)], colour)
    pen.polygon([(-0.05, 0.36), (-0.05, 0.74), (-0.34, 0.36)], dark(sail, 0.1))
    pen.polygon([(0.0, 0.94), (0.0, 0.84), (-0.16, 0.89)], (232, 60, 56))
    hull = pen.polygon([(-0.5, 0.3), (0.5, 0.3), (0.34, 0), (-0.32, 0), (-0.42, 0.1)], colour)
    pen.box(-0.5, 0.23, 0.5, 0.3, WHITE if colour[1] < 200 else WOOD, hull)
    pen.box(-0.5, 0, 0.5, 0.08, dark(colour, 0.35), hull)
    pen.row((-0.22, 0.0, 0.22), 0.155, 0.04, 0.04, light(GLASS, 0.4))


def cat(pen: Pen, colour: RGB, dice: Dice) -> None:
    shade, pale = (light(colour, 0.3) if max(colour) < 80 else dark(colour, 0.3)), light(colour, 0.6)
    pen.stroke([(0.2, 0.07), (0.35, 0.1), (0.38, 0.24), (0.33, 0.36)], 0.1, colour)
    pen.stroke([(0.375, 0.26), (0.33, 0.36)], 0.1, shade)
    body = pen.ellipse(0, 0.25, 0.26, 0.27, colour)
    for y in (0.34, 0.22):
        pen.polygon([(-0.3, y + 0.04), (-0.14, y), (-0.3, y - 0.03)], shade, body)
        pen.polygon([(0.3, y + 0.04), (0.14, y), (0.3, y - 0.03)], shade, body)
    pen.ellipse(0, 0.24, 0.12, 0.17, pale)
    pen.row((-0.1, 0.1), 0.05, 0.09, 0.055, pale)
    for side in (-1, 1):
        pen.polygon([(side * 0.3, 0.66), (side * 0.25, 1), (side * 0.04, 0.8)], colour)
        pen.polygon([(side * 0.245, 0.74), (side * 0.225, 0.91), (side * 0.11, 0.8)], ROSE)
    head = pen.ellipse(0, 0.65, 0.32, 0.24, colour)
    for x in (-0.09, 0, 0.09):
        pen.polygon([(x - 0.03, 0.92), (x + 0.03, 0.92), (x * 0.8, 0.77)], shade, head)
    pen.ellipse(0, 0.55, 0.13, 0.09, pale, within=head)
    iris = dice.pick(((120, 220, 90), (250, 220, 70)))
    for x in (-0.145, 0.145):
        pen.ellipse(x, 0.66, 0.08, 0.08, iris)
        pen.ellipse(x, 0.66, 0.034, 0.07, INK)
    pen.polygon([(-0.045, 0.59), (0.045, 0.59), (0, 0.545)], (232, 96, 116))
    whisker = light(colour, 0.8) if sum(colour) < 400 else INK
    for side in (-1, 1):
        for y in (0.6, 0.5):
            pen.stroke([(side * 0.19, 0.56), (side * 0.4, y)], 0.016, whisker)


def dog(pen: Pen, colour: RGB, dice: Dice) -> None:
    shade = light(colour, 0.25) if max(colour) < 80 else dark(colour, 0.38)
    pale = light(colour, 0.5)
    pen.stroke([(-0.34, 0.44), (-0.43, 0.56), (-0.45, 0.68)], 0.075, colour)
    for x in (-0.24, 0.16):
        pen.box(x - 0.055, 0, x + 0.055, 0.34, dark(colour, 0.22))
    body = pen.ellipse(-0.08, 0.38, 0.31, 0.18, colour)
    for x in (-0.32, 0.08):
        pen.box(x - 0.06, 0.02, x + 0.06, 0.36, colour)
        pen.ellipse(x + 0.015, 0.035, 0.08, 0.035, pale)
    if dice.chance(0.5):
        pen.ellipse(-0.16, 0.48, 0.13, 0.09, shade, within=body)
    pen.polygon([(0.02, 0.4), (0.14, 0.68), (0.34, 0.62), (0.2, 0.3)], colour)
    pen.polygon(
        [(0.07, 0.5), (0.1, 0.57), (0.29, 0.49), (0.25, 0.43)],
        (36, 150, 200) if colour[0] > 170 and colour[1] < 150 else (220, 48, 50),
    )
    pen.ellipse(0.22, 0.68, 0.2, 0.19, colour)
    pen.ellipse(0.39, 0.61, 0.12, 0.09, pale)
    pen.ellipse(0.46, 0.65, 0.05, 0.04, INK)
    pen.stroke([(0.34, 0.56), (0.45, 0.555)], 0.018, INK)
    pen.ellipse(0.27, 0.73, 0.045, 0.05, WHITE)
    pen.ellipse(0.282, 0.73, 0.03, 0.036, INK)
    pen.ellipse(0.08, 0.64, 0.085, 0.18, shade, turn=12)


def toy(pen: Pen, colour: RGB, dice: Dice) -> None:
    """A teddy bear, a rabbit or a robot."""
    (bear, rabbit, robot)[dice.number(3)](pen, colour, dice)


def bear(pen: Pen, colour: RGB, dice: Dice) -> None:
    pale = light(colour, 0.55)
    for side in (-1, 1):
        pen.ellipse(side * 0.24, 0.9, 0.11, 0.1, colour)
        pen.ellipse(side * 0.24, 0.9, 0.06, 0.055, pale)
    _plush(pen, colour, pale)


def rabbit(pen: Pen, colour: RGB, dice: Dice) -> None:
    pale = light(colour, 0.6)
    for side in (-1, 1):
        pen.ellipse(side * 0.15, 0.86, 0.075, 0.14, colour, turn=side * 8)
        pen.ellipse(side * 0.15, 0.86, 0.035, 0.1, pale, turn=side * 8)
    _plush(pen, colour, pale)


def _plush(pen: Pen, colour: RGB, pale: RGB) -> None:
    """Everything but the ears."""
    for side in (-1, 1):
        pen.ellipse(side * 0.29, 0.36, 0.085, 0.16, dark(colour, 0.12), turn=-side * 35)
        pen.ellipse(side * 0.19, 0.1, 0.14, 0.1, dark(colour, 0.12))
        pen.ellipse(side * 0.21, 0.09, 0.07, 0.06, pale)
    pen.ellipse(0, 0.31, 0.24, 0.24, colour)
    pen.ellipse(0, 0.29, 0.15, 0.16, pale)
    pen.ellipse(0, 0.69, 0.29, 0.24, colour)
    pen.ellipse(0, 0.61, 0.13, 0.1, pale)
    pen.row((-0.12, 0.12), 0.73, 0.042, 0.048, INK)
    pen.ellipse(0, 0.645, 0.05, 0.036, INK)
    pen.stroke([(-0.05, 0.575), (0, 0.56), (0.05, 0.575)], 0.022, INK)


def robot(pen: Pen, colour: RGB, dice: Dice) -> None:
    steel = (168, 176, 188)
    for side in (-1, 1):
        pen.stroke([(side * 0.24, 0.42), (side * 0.34, 0.28)], 0.08, steel)
        pen.ellipse(side * 0.34, 0.26, 0.05, 0.05, dark(steel))
        pen.box(side * 0.12 - 0.05, 0.04, side * 0.12 + 0.05, 0.2, steel)
        pen.rounded(side * 0.13 - 0.11, 0, side * 0.13 + 0.11, 0.08, 0.04, dark(steel))
    pen.box(-0.02, 0.84, 0.02, 0.94, steel)
    pen.ellipse(0, 0.95, 0.05, 0.05, GOLD)
    pen.box(-0.08, 0.46, 0.08, 0.58, steel)
    pen.rounded(-0.25, 0.15, 0.25, 0.5, 0.05, colour)
    pen.rounded(-0.14, 0.22, 0.14, 0.42, 0.04, light(colour, 0.55))
    pen.row((-0.07, 0.07), 0.35, 0.032, 0.032, dark(colour, 0.4))
    pen.box(-0.09, 0.25, 0.09, 0.28, dark(colour, 0.4))
    pen.rounded(-0.31, 0.54, 0.31, 0.86, 0.07, colour)
    pen.rounded(-0.23, 0.6, 0.23, 0.8, 0.05, INK)
    pen.row((-0.11, 0.11), 0.72, 0.055, 0.055, (150, 244, 255))
    pen.box(-0.1, 0.63, 0.1, 0.655, (150, 244, 255))


def ball(pen: Pen, colour: RGB, dice: Dice) -> None:
    other = WHITE if sum(colour) < 690 else (150, 156, 172)
    turn = dice.between(0, 120)
    whole = pen.ellipse(0, 0.5, 0.5, 0.5, colour)
    for k in range(3):
        start = turn + 120 * k
        wedge = [(0.12 * c - 0.06, 0.58 + 0.12 * s) for c, s in (turned(start), turned(start + 60))]
        rim = [(0.75 * c, 0.5 + 0.75 * s) for c, s in (turned(start + 72), turned(start + 36), turned(start))]
        pen.polygon([*wedge, *rim], other, whole)
    pen.ellipse(-0.06, 0.58, 0.12, 0.12, dark(colour, 0.12), within=whole)
    shadow = [*oval(0, 0.5, 0.51, 0.51), (0.51, 0.5), *oval(-0.07, 0.56, 0.47, 0.47), (0.4, 0.56)]
    pen.polygon(shadow, dark(colour, 0.35), whole)
    pen.ellipse(-0.2, 0.77, 0.1, 0.055, light(colour, 0.8), turn=-35)


def star(pen: Pen, colour: RGB, dice: Dice) -> None:
    tips = [(0.5 * turned(90 - 72 * k)[0], 0.47 + 0.53 * turned(90 - 72 * k)[1]) for k in range(5)]
    dents = [(0.235 * turned(54 - 72 * k)[0], 0.47 + 0.25 * turned(54 - 72 * k)[1]) for k in range(5)]
    centre = (0, 0.47)
    pen.polygon([point for pair in zip(tips, dents, strict=True) for point in pair], colour)
    for k in range(5):
        pen.polygon([centre, tips[k], dents[k]], dark(colour, 0.2))
    pen.ellipse(0, 0.47, 0.22, 0.2, colour)
    pen.row((-0.09, 0.09), 0.52, 0.036, 0.055, INK)
    pen.stroke([(-0.08, 0.42), (0, 0.385), (0.08, 0.42)], 0.03, INK)


def flower(pen: Pen, colour: RGB, dice: Dice) -> None:
    pen.stroke([(0, 0), (0.02, 0.3), (0, 0.6)], 0.055, LEAF)
    pen.ellipse(-0.14, 0.2, 0.15, 0.06, LEAF, turn=32)
    pen.ellipse(0.15, 0.27, 0.15, 0.06, light(LEAF, 0.15), turn=-32)
    petals = 6
    start = dice.between(0, 60)
    for k in range(petals):
        cosine, sine = turned(start + 360 / petals * k)
        tone = colour if k % 2 else light(colour, 0.25) if sum(colour) < 690 else dark(colour, 0.1)
        pen.ellipse(0.18 * cosine, 0.69 + 0.18 * sine, 0.125, 0.105, tone, turn=-(start + 360 / petals * k))
    yellow = colour[0] > 230 and colour[1] > 180 and colour[2] < 120
    pen.ellipse(0, 0.69, 0.11, 0.11, (140, 84, 40) if yellow else GOLD)
    pen.ellipse(-0.03, 0.72, 0.04, 0.035, (180, 120, 70) if yellow else light(GOLD, 0.5))


def mushroom(pen: Pen, colour: RGB, dice: Dice) -> None:
    pen.polygon([(-0.17, 0.06), (-0.1, 0), (0.1, 0), (0.17, 0.06), (0.12, 0.5), (-0.12, 0.5)], CREAM)
    pen.polygon([(0.03, 0.02), (0.17, 0.06), (0.12, 0.5), (0.05, 0.5)], dark(CREAM, 0.14))
    dome = [(x, y) for x, y in oval(0, 0.46, 0.44, 0.54) if y >= 0.46 - 1e-9]
    pen.ellipse(0, 0.46, 0.44, 0.09, mix(CREAM, WOOD, 0.35))
    cap = pen.polygon(dome, colour)
    pen.polygon([(0.44, 0.46), (0.3, 0.46), (0.34, 0.7), (0.2, 0.9), (0.5, 0.9)], dark(colour, 0.18), cap)
    shift = dice.between(-0.06, 0.06)
    for x, y, radius in (
        (-0.24, 0.62, 0.08),
        (0.02, 0.82, 0.09),
        (0.05, 0.56, 0.065),
        (0.29, 0.66, 0.075),
        (-0.36, 0.48, 0.05),
    ):
        pen.ellipse(x + shift, y, radius, radius * 0.85, WHITE, within=cap)


def cup(pen: Pen, colour: RGB, dice: Dice) -> None:
    pen.ring(0.27, 0.42, 0.22, 0.13, colour)
    pen.polygon([(-0.48, 0.78), (0.26, 0.78), (0.18, 0.06), (0.12, 0), (-0.34, 0), (-0.4, 0.06)], colour)
    pen.polygon([(-0.38, 0.7), (-0.28, 0.68), (-0.25, 0.08), (-0.32, 0.1)], light(colour, 0.45))
    pen.polygon([(0.1, 0.74), (0.26, 0.78), (0.18, 0.06), (0.1, 0.02)], dark(colour, 0.18))
    pen.ellipse(-0.11, 0.79, 0.37, 0.13, light(colour, 0.3))
    pen.ellipse(-0.11, 0.78, 0.31, 0.09, (96, 56, 34))
    pen.ellipse(-0.16, 0.765, 0.16, 0.04, (140, 90, 58))
    band = dice.number(3)
    if band == 0:
        pen.polygon(
            [(-0.435, 0.46), (0.225, 0.46), (0.208, 0.3), (-0.422, 0.3)],
            light(colour, 0.7) if sum(colour) < 690 else (150, 170, 200),
        )
    elif band == 1:
        pen.row((-0.3, -0.11, 0.08), 0.38, 0.06, 0.06, light(colour, 0.7) if sum(colour) < 690 else (150, 170, 200))


PAINTERS: dict[str, Callable[[Pen, RGB, Dice], None]] = {
    paint.__name__: paint for paint in (tree, house, car, boat, cat, dog, toy, ball, star, flower, mushroom, cup)
}
"""By class."""

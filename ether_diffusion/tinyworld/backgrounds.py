"""The eight settings: each has a ground and a sky or wall, with a few things in the distance."""

from __future__ import annotations

from collections.abc import Callable

from ether_diffusion.tinyworld.brush import SIDE, Canvas, Point, Region, dark, light, oval, polygon
from ether_diffusion.tinyworld.scenes import RGB, Dice

SURFACES: tuple[str, ...] = (
    "unlabelled", "sky", "grass", "snow", "sand", "water", "road", "pavement", "building", "mountain", "wall", "floor",
)  # fmt: skip
NOTHING, SKY, GRASS, SNOW, SAND, WATER, ROAD, PAVEMENT, BUILDING, MOUNTAIN, WALL, FLOOR = range(len(SURFACES))

WHITE = (255, 255, 255)


def meadow(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.62, (92, 172, 244), (204, 232, 252), SKY)
    for x in (dice.between(0.05, 0.4), dice.between(0.6, 0.95)):
        _cloud(canvas, x, dice.between(0.1, 0.26), dice.between(0.07, 0.11))
    _oval(canvas, dice.between(0.05, 0.35), 0.74, 0.5, dice.between(0.2, 0.28), (150, 206, 112), GRASS)
    _oval(canvas, dice.between(0.65, 0.95), 0.76, 0.5, dice.between(0.2, 0.28), (130, 194, 96), GRASS)
    canvas.ramp(0.62, 1, (120, 194, 76), (76, 158, 50), GRASS)
    for _ in range(14):
        x, y = dice.between(0, 1), dice.between(0.66, 1.02)
        _shape(canvas, [(x - 0.022, y), (x - 0.016, y - 0.05), (x, y - 0.012), (x + 0.014, y - 0.05), (x + 0.02, y)],
               (58, 134, 44), GRASS)  # fmt: skip
    for _ in range(7):
        _dot(canvas, dice.between(0, 1), dice.between(0.66, 1), 0.014, dice.pick((WHITE, (255, 236, 120))), GRASS)


def snow(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.6, (150, 172, 206), (212, 222, 238), SKY)
    for x, height in (
        (dice.between(0.1, 0.35), dice.between(0.26, 0.36)),
        (dice.between(0.6, 0.9), dice.between(0.2, 0.34)),
    ):
        top = 0.6 - height
        _shape(canvas, [(x - height, 0.6), (x, top), (x + height, 0.6)], (116, 134, 170), MOUNTAIN)
        cap = 0.12
        edge = [
            (x - cap, top + cap),
            (x - cap / 2, top + cap * 0.75),
            (x, top + cap * 1.1),
            (x + cap / 2, top + cap * 0.75),
        ]
        _shape(canvas, [*edge, (x + cap, top + cap), (x, top)], (250, 252, 255), MOUNTAIN)
    canvas.ramp(0.6, 1, (232, 240, 252), (250, 252, 255), SNOW)
    _oval(canvas, dice.between(0, 0.4), 0.76, 0.5, 0.14, (242, 247, 255), SNOW)
    _oval(canvas, dice.between(0.6, 1), 0.9, 0.5, 0.16, (222, 232, 248), SNOW)
    for _ in range(26):
        _dot(canvas, dice.between(0, 1), dice.between(0, 0.55), dice.between(0.01, 0.018), WHITE, SKY)


def beach(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.44, (70, 164, 240), (190, 230, 252), SKY)
    _oval(canvas, dice.pick((0.14, 0.86)), 0.13, 0.085, 0.085, (255, 232, 92), NOTHING)
    _cloud(canvas, dice.between(0.35, 0.65), dice.between(0.12, 0.24), 0.07)
    canvas.ramp(0.44, 0.63, (20, 104, 186), (64, 190, 214), WATER)
    canvas.ramp(0.63, 1, (250, 230, 176), (238, 206, 140), SAND)
    start = dice.between(0, 0.16)
    for k in range(-1, 7):
        _oval(canvas, start + k * 0.17, 0.625, 0.1, 0.022, (246, 252, 255), WATER)
    for _ in range(18):
        _dot(canvas, dice.between(0, 1), dice.between(0.69, 1), 0.009, (212, 176, 112), SAND)
    x, y = dice.pick((0.08, 0.92)), dice.between(0.84, 0.94)
    _oval(canvas, x, y, 0.04, 0.03, (250, 160, 150), NOTHING)  # a shell
    _shape(canvas, [(x - 0.05, y + 0.03), (x, y - 0.03), (x + 0.05, y + 0.03)], (252, 186, 172), NOTHING)


def night(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.64, (12, 14, 52), (52, 50, 122), SKY)
    for _ in range(22):
        _dot(canvas, dice.between(0, 1), dice.between(0, 0.52), dice.pick((0.008, 0.011, 0.015)), (255, 250, 214), SKY)
    x, y = dice.pick((0.16, 0.84)), dice.between(0.13, 0.18)
    moon = _region(oval(x, y, 0.095, 0.095))
    canvas.paint(moon, (255, 244, 190), NOTHING)
    bite = _region(oval(x + 0.045, y - 0.025, 0.08, 0.08))
    canvas.paint(bite.within(moon), (20, 22, 64), SKY)
    _oval(canvas, dice.between(0.1, 0.4), 0.78, 0.5, dice.between(0.24, 0.3), (42, 58, 110), MOUNTAIN)
    _oval(canvas, dice.between(0.6, 0.9), 0.8, 0.5, dice.between(0.24, 0.3), (36, 50, 96), MOUNTAIN)
    canvas.ramp(0.64, 1, (50, 98, 112), (36, 74, 88), GRASS)
    for _ in range(14):
        x, y = dice.between(0, 1), dice.between(0.68, 1.02)
        _shape(canvas, [(x - 0.02, y), (x, y - 0.045), (x + 0.02, y)], (34, 72, 92), GRASS)


def street(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.6, (150, 196, 232), (222, 234, 242), SKY)
    x = -dice.between(0, 0.1)
    fronts = dice.shuffled(((176, 122, 104), (148, 150, 164), (202, 182, 150), (126, 136, 156), (186, 160, 146)))
    for front in fronts:
        width, top = dice.between(0.19, 0.25), dice.between(0.14, 0.34)
        _box(canvas, x, top, x + width, 0.6, front, BUILDING)
        for row in range(4):
            for column in range(2):
                left, upper = x + width * (0.18 + 0.4 * column), top + 0.045 + row * 0.1
                if upper < 0.54:
                    _box(canvas, left, upper, left + width * 0.24, upper + 0.05, dark(front, 0.5), BUILDING)
        x += width + 0.01
    canvas.ramp(0.6, 0.68, (206, 202, 196), (190, 186, 180), PAVEMENT)
    canvas.ramp(0.68, 0.695, (150, 146, 142), (150, 146, 142), PAVEMENT)
    canvas.ramp(0.695, 1, (104, 106, 116), (84, 86, 96), ROAD)
    start = dice.between(-0.2, 0)
    for k in range(5):
        left = start + k * 0.3
        _shape(canvas, [(left, 0.86), (left + 0.16, 0.86), (left + 0.15, 0.895), (left - 0.015, 0.895)],
               (240, 240, 232), ROAD)  # fmt: skip


def water(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.54, (246, 132, 120), (255, 222, 162), SKY)
    x = dice.between(0.2, 0.8)
    _oval(canvas, x, 0.54, 0.15, 0.15, (255, 246, 190), NOTHING)
    for at in (dice.between(0, 0.3), dice.between(0.7, 1)):
        _oval(canvas, at, dice.between(0.1, 0.3), 0.18, 0.022, (255, 190, 160), SKY)
    canvas.ramp(0.54, 1, (44, 150, 196), (14, 84, 150), WATER)
    for k in range(4):
        _oval(canvas, x, 0.58 + k * 0.045, 0.13 - k * 0.02, 0.011, (250, 226, 180), WATER)
    for row in range(6):
        for _ in range(3):
            x, y = dice.between(-0.05, 1.05), 0.6 + row * 0.07
            _shape(canvas, _wave(x, y, 0.04 + row * 0.006), (112, 204, 230), WATER)


def desert(canvas: Canvas, dice: Dice) -> None:
    canvas.ramp(0, 0.62, (120, 208, 214), (250, 240, 200), SKY)
    _oval(canvas, dice.between(0.2, 0.8), 0.14, 0.08, 0.08, (255, 252, 226), NOTHING)
    left, right = dice.between(0.02, 0.3), dice.between(0.7, 0.98)
    for x, half, top in ((left, 0.16, 0.36), (right, 0.12, 0.42)):  # table mountains
        _shape(canvas, [(x - half, 0.62), (x - half * 0.7, top), (x + half * 0.7, top), (x + half, 0.62)],
               (190, 88, 58), MOUNTAIN)  # fmt: skip
        _box(canvas, x - half * 0.78, top + 0.05, x + half * 0.78, top + 0.085, (160, 66, 48), MOUNTAIN)
    canvas.ramp(0.6, 1, (232, 152, 76), (206, 116, 50), SAND)
    _oval(canvas, dice.between(0, 0.4), 0.86, 0.55, 0.17, (240, 166, 90), SAND)
    _oval(canvas, dice.between(0.6, 1), 0.98, 0.55, 0.18, (222, 134, 62), SAND)
    for side in (0.09, 0.91):
        if dice.chance(0.6):
            _cactus(canvas, side, dice.between(0.66, 0.72), dice.between(0.2, 0.27))


def room(canvas: Canvas, dice: Dice) -> None:
    paper = dice.pick(((250, 226, 196), (206, 226, 214), (226, 212, 236)))
    canvas.ramp(0, 0.66, paper, paper, WALL)
    for k in range(8):
        _box(canvas, k / 8, 0, k / 8 + 0.05, 0.66, dark(paper, 0.09), WALL)
    x = dice.pick((0.26, 0.74))
    _box(canvas, x - 0.17, 0.06, x + 0.17, 0.42, (255, 255, 252), NOTHING)  # a window
    _box(canvas, x - 0.14, 0.09, x + 0.14, 0.39, (140, 204, 246), NOTHING)
    _box(canvas, x - 0.012, 0.09, x + 0.012, 0.39, (255, 255, 252), NOTHING)
    _box(canvas, x - 0.14, 0.228, x + 0.14, 0.252, (255, 255, 252), NOTHING)
    x = 1 - x
    frame = dice.pick(((120, 78, 46), (60, 66, 90)))
    _box(canvas, x - 0.1, 0.12, x + 0.1, 0.34, frame, NOTHING)  # a picture
    _box(canvas, x - 0.075, 0.145, x + 0.075, 0.315, (252, 244, 220), NOTHING)
    _shape(canvas, [(x - 0.075, 0.315), (x - 0.02, 0.2), (x + 0.05, 0.315)], (112, 160, 130), NOTHING)
    _box(canvas, 0, 0.62, 1, 0.66, (252, 250, 244), WALL)
    canvas.ramp(0.66, 1, (186, 122, 72), (164, 100, 56), FLOOR)
    for row, y in enumerate((0.66, 0.73, 0.82, 0.93)):
        _box(canvas, 0, y, 1, y + 0.012, (128, 76, 42), FLOOR)
        start = dice.between(0, 0.5)
        for x in (start, start + 0.5):
            _box(canvas, x, y, x + 0.012, (0.73, 0.82, 0.93, 1)[row], (128, 76, 42), FLOOR)


PAINTERS: dict[str, Callable[[Canvas, Dice], None]] = {
    paint.__name__: paint for paint in (meadow, snow, beach, night, street, water, desert, room)
}
"""By setting."""

# A colour mixed into the ground around a thing's foot, and its share.
CONTACTS: dict[str, tuple[RGB, float]] = {
    "snow": ((70, 96, 160), 0.35),
    "water": ((214, 244, 252), 0.7),
    "night": ((4, 8, 28), 0.5),
}
SHADOW: tuple[RGB, float] = ((20, 18, 30), 0.38)


def _cloud(canvas: Canvas, x: float, y: float, size: float) -> None:
    for across, up, share in ((-0.9, 0.15, 0.6), (0, 0, 1), (0.9, 0.2, 0.65)):
        _oval(canvas, x + across * size, y + up * size, size * share, size * share * 0.62, (252, 253, 255), SKY)
    _box(canvas, x - 1.2 * size, y + 0.2 * size, x + 1.3 * size, y + 0.6 * size, (252, 253, 255), SKY)


def _wave(x: float, y: float, half: float) -> list[Point]:
    crests = [(x - half, y), (x - half / 2, y - 0.022), (x, y), (x + half / 2, y - 0.022), (x + half, y)]
    return [*crests, (x + half / 2, y - 0.008), (x, y + 0.014), (x - half / 2, y - 0.008)]


def _cactus(canvas: Canvas, x: float, foot: float, height: float) -> None:
    green, half = (66, 138, 84), height * 0.11
    _box(canvas, x - half, foot - height, x + half, foot, green, NOTHING)
    _oval(canvas, x, foot - height, half, half, green, NOTHING)
    for side, up in ((-1, 0.45), (1, 0.6)):
        reach, y = x + side * height * 0.3, foot - height * up
        _box(canvas, min(x, reach), y - half * 0.7, max(x, reach), y + half * 0.7, green, NOTHING)
        _box(canvas, reach - half * 0.8, y - height * 0.25, reach + half * 0.8, y + half * 0.7, green, NOTHING)
    _box(canvas, x - half * 0.3, foot - height, x, foot, light(green, 0.25), NOTHING)


# Shapes in shares of the picture's side, from its upper left corner.


def _region(points: list[Point]) -> Region:
    return polygon([(x * SIDE, y * SIDE) for x, y in points])


def _shape(canvas: Canvas, points: list[Point], colour: RGB, label: int) -> None:
    canvas.paint(_region(points), colour, label)


def _oval(canvas: Canvas, x: float, y: float, width: float, height: float, colour: RGB, label: int) -> None:
    _shape(canvas, oval(x, y, width, height), colour, label)


def _box(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: RGB, label: int) -> None:
    canvas.box(round(top * SIDE), round(left * SIDE), round(bottom * SIDE), round(right * SIDE), colour, label)


def _dot(canvas: Canvas, x: float, y: float, radius: float, colour: RGB, label: int) -> None:
    """An octagon, close to round at this size and quick."""
    corner, edge = radius, radius * 0.4
    _box(canvas, x - edge, y - corner, x + edge, y + corner, colour, label)
    _box(canvas, x - corner, y - edge, x + corner, y + edge, colour, label)
    inner = radius * 0.7
    _box(canvas, x - inner, y - inner, x + inner, y + inner, colour, label)

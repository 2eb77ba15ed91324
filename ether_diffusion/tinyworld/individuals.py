"""The looks of the built-in subjects: shapes, patterns and colours that no sampled scene has."""

from __future__ import annotations

from collections.abc import Callable

from ether_diffusion.tinyworld.brush import Pen, Point, dark, light, turned
from ether_diffusion.tinyworld.scenes import RGB

INK, WHITE, CREAM, STEEL = (30, 30, 42), (255, 255, 255), (255, 242, 214), (164, 172, 184)
TEAL, YELLOW, RED, ORANGE, PINK = (28, 166, 160), (255, 214, 64), (226, 48, 56), (246, 136, 38), (255, 158, 190)
NAVY, LIME, VIOLET, GINGER, CHOCOLATE = (40, 62, 130), (150, 220, 60), (120, 80, 200), (206, 134, 66), (104, 62, 40)


def robot(pen: Pen, pose: float) -> None:
    """Teal, with a wide head, yellow eyes, an antenna with a red ball, a striped belly, and orange ears and feet."""
    for side in (-1, 1):
        _arm(pen, side, 0.42, (pose if side < 0 else 1 - pose) * 110 + 20, STEEL, ORANGE)
        pen.box(side * 0.12 - 0.05, 0.05, side * 0.12 + 0.05, 0.18, STEEL)
        pen.ellipse(side * 0.14, 0.05, 0.13, 0.05, ORANGE)
        pen.rounded(side * 0.37 - 0.05, 0.62, side * 0.37 + 0.05, 0.76, 0.04, ORANGE)
    pen.stroke([(0, 0.82), (0.03, 0.92)], 0.04, STEEL)
    pen.ellipse(0.03, 0.94, 0.065, 0.065, RED)
    pen.rounded(-0.23, 0.14, 0.23, 0.5, 0.09, TEAL)
    belly = pen.rounded(-0.15, 0.18, 0.15, 0.44, 0.07, CREAM)
    for y in (0.22, 0.31, 0.4):
        pen.box(-0.2, y - 0.018, 0.2, y + 0.024, RED, belly)
    pen.rounded(-0.36, 0.52, 0.36, 0.86, 0.13, TEAL)
    pen.box(-0.22, 0.815, 0.22, 0.84, light(TEAL, 0.4))
    for x in (-0.16, 0.16):
        pen.ellipse(x, 0.71, 0.115, 0.105, YELLOW)
        pen.ellipse(x + 0.02, 0.71, 0.05, 0.055, INK)
        pen.ellipse(x, 0.735, 0.022, 0.022, WHITE)
    pen.stroke([(-0.1, 0.585), (0, 0.565), (0.1, 0.585)], 0.028, CREAM)


def monster(pen: Pen, pose: float) -> None:
    """Violet and shaggy, with one big eye, lime horns and spots, a wide toothy mouth and yellow boots."""
    for side in (-1, 1):
        _arm(pen, side, 0.46, (1 - pose if side < 0 else pose) * 120 + 15, VIOLET, LIME)
        pen.polygon([(side * 0.25, 0.74), (side * 0.36, 1), (side * 0.08, 0.84)], LIME)
        pen.rounded(side * 0.15 - 0.12, 0, side * 0.15 + 0.12, 0.13, 0.05, YELLOW)
    pen.polygon(_jagged(0, 0.49, 0.31, 0.4, 18, 0.86), VIOLET)
    for x, y in ((-0.2, 0.3), (0.21, 0.34), (-0.23, 0.52), (0.2, 0.2), (0.24, 0.56)):
        pen.ellipse(x, y, 0.04, 0.04, LIME)
    pen.ellipse(0, 0.64, 0.17, 0.16, WHITE)
    pen.ellipse(0.02, 0.63, 0.09, 0.09, ORANGE)
    pen.ellipse(0.02, 0.63, 0.05, 0.055, INK)
    pen.ellipse(-0.02, 0.68, 0.028, 0.028, WHITE)
    mouth = pen.rounded(-0.17, 0.27, 0.17, 0.41, 0.06, INK)
    for x in (-0.11, 0, 0.11):
        pen.polygon([(x - 0.05, 0.42), (x + 0.05, 0.42), (x, 0.33)], WHITE, mouth)


def spotted_dog(pen: Pen, pose: float) -> None:
    """White, with chocolate patches, one of them around the eye, a chocolate ear and tail, and a teal scarf."""
    tail = [(-0.34, 0.44), (-0.43, 0.54), (-0.47 + 0.1 * pose, 0.7)]
    pen.stroke(tail[:2], 0.08, WHITE)
    pen.stroke(tail[1:], 0.08, CHOCOLATE)
    for x in (-0.24, 0.16):
        pen.box(x - 0.055, 0, x + 0.055, 0.34, dark(CREAM, 0.2))
    body = pen.ellipse(-0.08, 0.38, 0.31, 0.18, WHITE)
    for x in (-0.32, 0.08):
        pen.box(x - 0.06, 0.02, x + 0.06, 0.36, WHITE)
        pen.ellipse(x + 0.015, 0.04, 0.08, 0.04, CHOCOLATE)
    for x, y, radius in ((-0.26, 0.46, 0.11), (-0.03, 0.5, 0.09), (-0.12, 0.3, 0.07), (0.12, 0.34, 0.06)):
        pen.ellipse(x, y, radius, radius * 0.85, CHOCOLATE, within=body)
    pen.polygon([(0.02, 0.4), (0.14, 0.68), (0.34, 0.62), (0.2, 0.3)], WHITE)
    head = pen.ellipse(0.22, 0.7, 0.21, 0.19, WHITE)
    pen.ellipse(0.3, 0.76, 0.12, 0.12, CHOCOLATE, within=head)
    pen.ellipse(0.39, 0.62, 0.12, 0.09, WHITE)
    pen.ellipse(0.47, 0.66, 0.05, 0.042, INK)
    pen.polygon([(0.34, 0.56), (0.43, 0.56), (0.4, 0.47)], PINK)
    pen.ellipse(0.28, 0.75, 0.05, 0.055, WHITE)
    pen.ellipse(0.295, 0.75, 0.032, 0.038, INK)
    pen.ellipse(0.08, 0.67, 0.085, 0.18, CHOCOLATE, turn=12 - 14 * pose)
    pen.polygon([(0.02, 0.49), (0.08, 0.58), (0.31, 0.5), (0.27, 0.41)], TEAL)
    pen.polygon([(0.12, 0.48), (0.26, 0.44), (0.2, 0.26)], TEAL)
    for x, y in ((0.13, 0.51), (0.23, 0.47), (0.19, 0.37)):
        pen.ellipse(x, y, 0.02, 0.02, YELLOW)


def party_cat(pen: Pen, pose: float) -> None:
    """Grey with navy stripes, a pink party hat with yellow dots, odd eyes and a red bow tie."""
    grey = (158, 168, 190)
    pen.stroke([(0.2, 0.06), (0.35, 0.09), (0.39, 0.22), (0.33 + 0.06 * pose, 0.38)], 0.1, grey)
    pen.stroke([(0.39, 0.22), (0.375, 0.28)], 0.1, NAVY)
    pen.ellipse(0.33 + 0.06 * pose, 0.38, 0.055, 0.055, NAVY)
    body = pen.ellipse(0, 0.23, 0.26, 0.25, grey)
    for y in (0.36, 0.25, 0.14):
        for side in (-1, 1):
            pen.polygon([(side * 0.3, y + 0.045), (side * 0.1, y), (side * 0.3, y - 0.03)], NAVY, body)
    pen.row((-0.1, 0.1), 0.05, 0.09, 0.05, WHITE)
    for side in (-1, 1):
        pen.polygon([(side * 0.31, 0.58), (side * 0.3, 0.86), (side * 0.08, 0.74)], NAVY)
        pen.polygon([(side * 0.26, 0.66), (side * 0.265, 0.79), (side * 0.15, 0.74)], PINK)
    head = pen.ellipse(0, 0.56, 0.32, 0.22, grey)
    for side in (-1, 1):
        for y in (0.6, 0.5):
            pen.polygon([(side * 0.35, y + 0.035), (side * 0.2, y), (side * 0.35, y - 0.025)], NAVY, head)
    pen.ellipse(0, 0.47, 0.13, 0.085, WHITE, within=head)
    for x, iris in ((-0.125, (90, 200, 250)), (0.125, ORANGE)):
        pen.ellipse(x, 0.575, 0.08, 0.075, iris)
        pen.ellipse(x, 0.575, 0.034, 0.06, INK)
    pen.polygon([(-0.045, 0.51), (0.045, 0.51), (0, 0.465)], (232, 96, 116))
    for side in (-1, 1):
        pen.polygon([(0, 0.335), (side * 0.14, 0.4), (side * 0.14, 0.27)], RED)
    pen.ellipse(0, 0.335, 0.035, 0.035, YELLOW)
    hat = pen.polygon([(-0.15, 0.73), (0.15, 0.73), (0.02, 0.97)], (240, 70, 150))
    for x, y in ((-0.06, 0.77), (0.06, 0.78), (0.0, 0.86)):
        pen.ellipse(x, y, 0.028, 0.028, YELLOW, within=hat)
    pen.ellipse(0.02, 0.965, 0.045, 0.035, WHITE)


def racing_car(pen: Pen, pose: float) -> None:
    """Sky blue with an orange stripe, a number disc, a tail wing, an open seat with a driver and a chequered flag."""
    sky = (96, 196, 240)
    pen.stroke([(-0.34, 0.3), (-0.34, 0.56)], 0.025, STEEL)
    for row in range(2):
        for column in range(3):
            x, y = -0.34 + 0.06 * column, 0.5 - 0.06 * row + 0.015 * pose * column
            pen.box(x, y, x + 0.06, y + 0.06, INK if (row + column) % 2 else WHITE)
    pen.box(-0.5, 0.38, -0.36, 0.43, ORANGE)
    pen.box(-0.46, 0.28, -0.41, 0.4, NAVY)
    pen.ellipse(-0.01, 0.42, 0.095, 0.1, YELLOW)  # the driver's helmet
    pen.polygon([(0.0, 0.45), (0.085, 0.45), (0.085, 0.37), (0.03, 0.37)], INK)
    body = pen.polygon(
        [(-0.48, 0.13), (-0.48, 0.3), (-0.2, 0.35), (0.1, 0.35), (0.36, 0.28), (0.5, 0.2), (0.5, 0.13)], sky
    )
    pen.polygon([(-0.5, 0.2), (-0.5, 0.26), (0.36, 0.26), (0.5, 0.2)], ORANGE, body)
    pen.box(-0.5, 0.12, 0.5, 0.165, NAVY, body)
    pen.polygon([(0.09, 0.34), (0.15, 0.44), (0.19, 0.33)], light(sky, 0.6))
    pen.ellipse(-0.04, 0.23, 0.095, 0.095, WHITE)
    pen.box(-0.06, 0.17, -0.02, 0.29, INK)  # a one without serifs: flipped photos read the same
    for x in (-0.3, 0.3):
        pen.ellipse(x, 0.135, 0.145, 0.135, INK)
        pen.ellipse(x, 0.135, 0.085, 0.08, YELLOW)
        pen.ellipse(x, 0.135, 0.035, 0.035, RED)


def smiling_mug(pen: Pen, pose: float) -> None:
    """Mint above and coral below, with a smiling face, rosy cheeks, a heart of foam and a spotted handle."""
    mint, coral = (150, 232, 196), (250, 122, 98)
    pen.ring(0.27, 0.42, 0.22, 0.12, coral)
    for k in range(-2, 3):
        cosine, sine = turned(k * 38)
        pen.ellipse(0.27 + 0.17 * cosine, 0.42 + 0.17 * sine, 0.035, 0.035, WHITE)
    body = pen.polygon([(-0.48, 0.78), (0.26, 0.78), (0.2, 0.06), (0.14, 0), (-0.36, 0), (-0.42, 0.06)], mint)
    wave = [(-0.6, 0.3), (-0.4, 0.22), (-0.2, 0.3), (0, 0.22), (0.2, 0.3), (0.4, 0.22), (0.4, -0.1), (-0.6, -0.1)]
    pen.polygon(wave, coral, body)
    for x in (-0.27, 0.05):
        if pose > 0.6 and x > 0:  # a wink
            pen.stroke([(x - 0.06, 0.5), (x, 0.53), (x + 0.06, 0.5)], 0.035, INK)
        else:
            pen.ellipse(x, 0.51, 0.055, 0.075, INK)
            pen.ellipse(x - 0.015, 0.54, 0.022, 0.026, WHITE)
    pen.row((-0.36, 0.14), 0.41, 0.055, 0.04, PINK)
    pen.stroke([(-0.2, 0.42), (-0.15, 0.37), (-0.07, 0.37), (-0.02, 0.42)], 0.035, INK)
    pen.ellipse(-0.11, 0.79, 0.37, 0.12, light(mint, 0.4))
    pen.ellipse(-0.11, 0.785, 0.31, 0.085, CHOCOLATE)
    pen.row((-0.17, -0.05), 0.81, 0.07, 0.04, CREAM)
    pen.polygon([(-0.235, 0.8), (0.015, 0.8), (-0.11, 0.72)], CREAM)


def pirate_boat(pen: Pen, pose: float) -> None:
    """A crimson hull with a yellow zigzag, one striped black and white sail, a lime flag and a lantern."""
    crimson = (176, 32, 72)
    pen.box(-0.03, 0.24, 0.03, 0.9, CHOCOLATE)
    flag = 0.88 + 0.05 * pose
    pen.polygon([(0.02, 0.94), (0.02, 0.82), (0.2, flag)], LIME)
    sail = pen.polygon([(-0.34, 0.8), (0.32, 0.8), (0.4, 0.4), (0.04, 0.36), (-0.4, 0.4), (-0.3, 0.6)], WHITE)
    for x in (-0.36, -0.12, 0.12, 0.36):
        pen.polygon([(x - 0.06, 0.85), (x + 0.06, 0.85), (x + 0.07, 0.3), (x - 0.07, 0.3)], INK, sail)
    pen.ellipse(0, 0.6, 0.11, 0.11, YELLOW)
    pen.row((-0.035, 0.04), 0.625, 0.02, 0.026, INK)
    pen.stroke([(-0.05, 0.565), (0, 0.545), (0.05, 0.565)], 0.022, INK)
    hull = pen.polygon([(-0.5, 0.38), (-0.34, 0.28), (0.34, 0.28), (0.5, 0.4), (0.36, 0), (-0.34, 0)], crimson)
    for k in range(6):
        x = -0.48 + 0.16 * k
        pen.polygon([(x, 0.26), (x + 0.08, 0.14), (x + 0.16, 0.26)], YELLOW, hull)
    pen.box(-0.5, 0, 0.5, 0.07, NAVY, hull)
    pen.ellipse(0.46, 0.44, 0.045, 0.055, ORANGE)


def gingerbread_house(pen: Pen, pose: float) -> None:
    """Gingerbread with a roof of pink icing and coloured drops, a candy-cane chimney and a round blue door."""
    for k in range(4):
        pen.box(0.2, 0.62 + 0.08 * k, 0.32, 0.7 + 0.08 * k, RED if k % 2 else WHITE)
    for k in range(round(1 + 2 * pose)):
        pen.ellipse(0.27 + 0.05 * k, 0.94 + 0.02 * k, 0.04 + 0.01 * k, 0.035, (226, 228, 236))
    pen.box(-0.38, 0, 0.38, 0.56, GINGER)
    pen.row((-0.3, -0.1, 0.1, 0.3), 0.02, 0.11, 0.05, WHITE)
    roof = pen.polygon([(-0.46, 0.5), (0.46, 0.5), (0.24, 0.8), (0, 0.98), (-0.24, 0.8)], PINK)
    pen.row((-0.36, -0.18, 0, 0.18, 0.36), 0.51, 0.095, 0.06, PINK)
    drops: tuple[RGB, ...] = (LIME, YELLOW, (90, 190, 250), RED, VIOLET, ORANGE)
    for (x, y), drop in zip(
        ((-0.27, 0.6), (-0.09, 0.62), (0.1, 0.6), (0.28, 0.61), (-0.1, 0.77), (0.09, 0.78)), drops, strict=True
    ):
        pen.ellipse(x, y, 0.05, 0.045, drop, within=roof)
    pen.ellipse(-0.12, 0.2, 0.14, 0.2, WHITE)
    pen.box(-0.26, 0, 0.02, 0.2, WHITE)
    pen.ellipse(-0.12, 0.2, 0.1, 0.15, (60, 130, 230))
    pen.box(-0.22, 0, -0.02, 0.2, (60, 130, 230))
    pen.ellipse(-0.06, 0.17, 0.022, 0.022, YELLOW)
    pen.ellipse(0.2, 0.28, 0.11, 0.11, WHITE)
    pen.ellipse(0.2, 0.28, 0.075, 0.075, YELLOW)
    pen.box(0.19, 0.2, 0.21, 0.36, WHITE)
    pen.box(0.12, 0.27, 0.28, 0.29, WHITE)


PAINTERS: dict[str, Callable[[Pen, float], None]] = {
    paint.__name__: paint
    for paint in (robot, monster, spotted_dog, party_cat, racing_car, smiling_mug, pirate_boat, gingerbread_house)
}
"""By the subject's name."""


def _arm(pen: Pen, side: int, shoulder: float, degrees: float, colour: RGB, hand: RGB) -> None:
    """`degrees` from hanging down to raised."""
    cosine, sine = turned(degrees)
    end = side * (0.22 + 0.16 * sine), shoulder - 0.18 * cosine
    pen.stroke([(side * 0.22, shoulder), end], 0.085, colour)
    pen.ellipse(*end, 0.062, 0.062, hand)


def _jagged(x: float, y: float, width: float, height: float, tufts: int, depth: float) -> list[Point]:
    """An ellipse with tufts of fur."""
    points = []
    for k in range(2 * tufts):
        cosine, sine = turned(180 / tufts * k)
        reach = depth if k % 2 else 1.0
        points.append((x + width * cosine * reach, y + height * sine * reach))
    return points

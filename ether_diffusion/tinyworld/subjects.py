"""Built-in subjects: "photos" of one individual toy in several places, drawn in code, for runs without a camera."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

SIZE = 128
_SCALE = 4  # drawn larger and scaled down, which smooths the edges
_CANVAS = SIZE * _SCALE

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """What a subject is called, and how its photos are drawn."""

    class_name: str
    render: Callable[[], list[Image.Image]]


def render_photos(name: str) -> list[Image.Image]:
    """The photos of a subject in `SUBJECTS`: RGB, 128 x 128, the same on every call."""
    return SUBJECTS[name].render()


def _robot_photos() -> list[Image.Image]:
    return [
        _photo(_living_room(), x=245, foot=462, height=390, arms=(25, 25)),
        _photo(_meadow(), x=290, foot=476, height=410, tilt=-5, arms=(25, 118), light=(255, 250, 225)),
        _photo(_beach(), x=200, foot=462, height=350, tilt=4, arms=(70, 70), light=(255, 244, 214)),
        _photo(_snow(), x=295, foot=468, height=385, tilt=3, arms=(118, 25), light=(222, 232, 255)),
        _photo(_bookshelf(), x=215, foot=466, height=370, tilt=-2, arms=(25, 80), light=(255, 238, 214)),
    ]


SUBJECTS = {"robot": Subject("toy", _robot_photos)}


# The toy: a teal robot with a wide head, yellow eyes, a red antenna ball, a striped belly and orange feet.
TEAL, DARK_TEAL, LIGHT_TEAL = (32, 160, 158), (18, 112, 118), (92, 205, 198)
YELLOW, RED, ORANGE, CREAM, INK, STEEL = (
    (255, 214, 64),
    (230, 54, 62),
    (246, 138, 40),
    (255, 244, 220),
    (34, 38, 54),
    (150, 160, 172),
)


def _robot(arms: tuple[float, float]) -> Image.Image:
    """The toy on a transparent ground of 400 x 520, standing at y = 500; `arms` in degrees from hanging down."""
    toy = Image.new("RGBA", (400, 520))
    draw = ImageDraw.Draw(toy)
    for side, angle in ((-1, arms[0]), (1, arms[1])):
        _arm(draw, 200 + side * 92, 300, side, angle)
    for x in (152, 248):  # legs and feet
        draw.rectangle((x - 18, 410, x + 18, 470), fill=STEEL)
        draw.rectangle((x - 18, 432, x + 18, 440), fill=(112, 122, 136))
        draw.pieslice((x - 48, 440, x + 48, 550), 180, 360, fill=ORANGE)
        draw.rectangle((x - 48, 488, x + 48, 500), fill=(204, 100, 20))
    toy.paste((0, 0, 0, 0), (0, 501, 400, 520))
    draw.line((200, 60, 200, 20), fill=STEEL, width=10)  # antenna
    draw.ellipse((176, 2, 224, 50), fill=RED)
    draw.ellipse((186, 10, 202, 26), fill=(255, 150, 150))
    draw.rectangle((170, 222, 230, 252), fill=STEEL)  # neck
    _shaded_box(toy, (100, 242, 300, 424), 40)
    _shaded_box(toy, (62, 58, 338, 232), 60)
    draw = ImageDraw.Draw(toy)
    for x in (52, 348):  # ears
        draw.rounded_rectangle((x - 18, 112, x + 18, 178), 14, fill=ORANGE)
        draw.line((x, 122, x, 168), fill=(204, 100, 20), width=6)
    draw.rounded_rectangle((88, 88, 312, 206), 44, fill=INK)  # face
    for x in (145, 255):
        draw.ellipse((x - 38, 100, x + 38, 176), fill=YELLOW)
        draw.ellipse((x - 19, 119, x + 19, 157), fill=INK)
        draw.ellipse((x - 14, 120, x + 2, 136), fill="white")
    draw.arc((160, 140, 240, 196), 25, 155, fill=CREAM, width=9)
    draw.rounded_rectangle((136, 276, 264, 398), 26, fill=CREAM)  # belly with stripes and a heart
    for y in (344, 370):
        draw.rectangle((136, y, 264, y + 13), fill=RED)
    draw.ellipse((172, 288, 202, 318), fill=RED)
    draw.ellipse((198, 288, 228, 318), fill=RED)
    draw.polygon([(174, 310), (226, 310), (200, 336)], fill=RED)
    return toy


def _arm(draw: ImageDraw.ImageDraw, x: float, y: float, side: int, angle: float) -> None:
    turn = math.radians(angle)
    hand = x + side * 78 * math.sin(turn), y + 78 * math.cos(turn)
    draw.line((x, y, *hand), fill=STEEL, width=30)
    for share in (0.45, 0.7):
        at = x + (hand[0] - x) * share, y + (hand[1] - y) * share
        draw.ellipse((at[0] - 17, at[1] - 17, at[0] + 17, at[1] + 17), fill=(182, 190, 200))
    draw.ellipse((x - 28, y - 28, x + 28, y + 28), fill=DARK_TEAL)
    draw.ellipse((hand[0] - 30, hand[1] - 30, hand[0] + 30, hand[1] + 30), fill=ORANGE)


def _shaded_box(image: Image.Image, box: tuple[int, int, int, int], radius: int) -> None:
    """A rounded teal box, lit from the upper left."""
    shade = Image.linear_gradient("L").rotate(-60, Image.Resampling.BICUBIC).crop((50, 50, 206, 206)).resize(image.size)
    fill = Image.composite(Image.new("RGB", image.size, DARK_TEAL), Image.new("RGB", image.size, LIGHT_TEAL), shade)
    fill = Image.blend(fill, Image.new("RGB", image.size, TEAL), 0.55)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, fill=255)
    image.paste(fill, mask=mask)


def _photo(
    place: Image.Image,
    *,
    x: int,
    foot: int,
    height: int,
    tilt: float = 0,
    arms: tuple[float, float],
    light: RGB = (255, 255, 255),
) -> Image.Image:
    """The robot in a place: `x` and `foot` are where its feet stand, in the large drawing's pixels."""
    toy = ImageOps.expand(_robot(arms), (60, 0), fill=(0, 0, 0, 0))  # room to lean
    alpha = toy.getchannel("A")
    toy = Image.merge(
        "RGBA", (*ImageChops.multiply(toy.convert("RGB"), Image.new("RGB", toy.size, light)).split(), alpha)
    )
    toy = toy.rotate(tilt, Image.Resampling.BICUBIC, center=(260, 500))
    toy = toy.resize((round(520 * height / 500), round(520 * height / 500)), Image.Resampling.LANCZOS)
    shadow = Image.new("L", place.size)
    reach = height * 0.36
    ImageDraw.Draw(shadow).ellipse((x - reach, foot - reach * 0.2, x + reach * 1.3, foot + reach * 0.22), fill=120)
    place.paste((24, 22, 40), mask=shadow.filter(ImageFilter.GaussianBlur(9)))
    place.paste(toy, (x - toy.width // 2, foot - height), toy)
    return place.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _ground(sky_top: RGB, sky: RGB, horizon: int, near: RGB, far: RGB) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty place: one gradient above the horizon, another below it."""
    place = Image.new("RGB", (_CANVAS, _CANVAS))
    ramp = Image.linear_gradient("L")
    for top, bottom, first, last in ((0, horizon, sky_top, sky), (horizon, _CANVAS, far, near)):
        size = (_CANVAS, bottom - top)
        blended = Image.composite(Image.new("RGB", size, last), Image.new("RGB", size, first), ramp.resize(size))
        place.paste(blended, (0, top))
    return place, ImageDraw.Draw(place)


def _blurred(place: Image.Image, radius: float) -> Image.Image:
    """Out of focus, as things behind the subject are."""
    return place.filter(ImageFilter.GaussianBlur(radius))


def _living_room() -> Image.Image:
    place, draw = _ground((236, 214, 190), (222, 192, 164), 350, (150, 92, 52), (178, 116, 70))
    draw.rectangle((330, 40, 480, 220), fill=(250, 250, 244))  # window
    draw.rectangle((344, 54, 466, 206), fill=(150, 206, 240))
    draw.ellipse((330, 150, 480, 300), fill=(110, 176, 96))
    draw.rectangle((330, 206, 480, 348), fill=(227, 202, 175))
    draw.rectangle((330, 206, 480, 222), fill=(250, 250, 244))
    draw.rectangle((400, 54, 410, 206), fill=(250, 250, 244))
    draw.rectangle((44, 60, 150, 170), fill=(120, 78, 48))  # picture
    draw.rectangle((56, 72, 138, 158), fill=(244, 226, 180))
    draw.polygon([(56, 158), (90, 100), (120, 158)], fill=(196, 104, 90))
    place = _blurred(place, 3)
    draw = ImageDraw.Draw(place)
    for y in (384, 424, 470):
        draw.line((0, y, _CANVAS, y), fill=(128, 76, 42), width=4)
    for x, top, bottom in ((90, 350, 384), (380, 350, 384), (240, 384, 424), (450, 424, 470), (60, 424, 470)):
        draw.line((x, top, x, bottom), fill=(128, 76, 42), width=4)
    return place


def _meadow() -> Image.Image:
    place, draw = _ground((96, 176, 240), (190, 226, 248), 270, (70, 150, 52), (140, 200, 90))
    draw.ellipse((40, 30, 120, 110), fill=(255, 240, 150))
    for x, y in ((250, 70), (420, 110)):
        for dx, dy, r in ((-40, 8, 26), (0, 0, 36), (40, 10, 24)):
            draw.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill="white")
    draw.ellipse((-120, 200, 260, 420), fill=(116, 184, 84))
    draw.ellipse((260, 215, 640, 420), fill=(104, 172, 78))
    draw.rectangle((62, 170, 82, 260), fill=(110, 76, 48))
    draw.ellipse((10, 90, 134, 214), fill=(56, 130, 62))
    draw.rectangle((0, 330, _CANVAS, _CANVAS), fill=(88, 166, 64))
    place = _blurred(place, 3)
    draw = ImageDraw.Draw(place)
    for i in range(46):
        x, y = (i * 137) % 520 - 4, 345 + (i * 61) % 165
        draw.polygon([(x - 6, y), (x + 6, y), (x + 2, y - 24)], fill=(66, 140, 48))
    for i, colour in enumerate([(255, 255, 255), (250, 120, 170), (190, 110, 230)] * 3):
        x, y = (40 + i * 211) % 500, 366 + (i * 71) % 128
        for petal in range(5):
            angle = petal * math.tau / 5
            px, py = x + 9 * math.cos(angle), y + 9 * math.sin(angle)
            draw.ellipse((px - 8, py - 8, px + 8, py + 8), fill=colour)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(255, 214, 64))
    return place


def _beach() -> Image.Image:
    place, draw = _ground((70, 150, 226), (170, 220, 246), 210, (240, 214, 156), (250, 230, 180))
    draw.rectangle((0, 200, _CANVAS, 290), fill=(34, 120, 186))
    draw.rectangle((0, 262, _CANVAS, 300), fill=(72, 176, 206))
    for x in range(-20, _CANVAS, 64):
        draw.ellipse((x, 284, x + 90, 316), fill=(250, 252, 255))
    draw.rectangle((0, 308, _CANVAS, 330), fill=(226, 198, 140))
    draw.polygon([(24, 196), (92, 196), (80, 214), (36, 214)], fill=(180, 70, 60))
    draw.polygon([(54, 190), (54, 112), (100, 184)], fill="white")
    draw.line((398, 400, 372, 130), fill=(240, 240, 236), width=10)  # parasol
    for i, colour in enumerate([(236, 84, 120), (255, 250, 244)] * 3):
        draw.pieslice((252, 60, 492, 280), 174 + i * 30, 204 + i * 30, fill=colour)
    place = _blurred(place, 2)
    draw = ImageDraw.Draw(place)
    points = [(430, 452)]
    star = [
        (points[0][0] + r * math.sin(k * math.tau / 10), points[0][1] - r * math.cos(k * math.tau / 10))
        for k, r in enumerate([34, 14] * 5)
    ]
    draw.polygon(star, fill=(228, 120, 96))
    draw.pieslice((40, 440, 110, 510), 180, 360, fill=(250, 236, 240))
    for i in range(-2, 3):
        draw.line((75, 475, 75 + i * 15, 446), fill=(220, 160, 180), width=4)
    return place


def _snow() -> Image.Image:
    place, draw = _ground((38, 46, 104), (128, 128, 190), 300, (226, 234, 250), (196, 208, 238))
    draw.ellipse((70, 40, 150, 120), fill=(250, 246, 220))
    for x, base, size in ((60, 330, 170), (160, 318, 120), (450, 335, 190), (360, 312, 100)):
        draw.rectangle((x - 8, base - 10, x + 8, base + 20), fill=(84, 60, 52))
        for step in range(3):
            half, top = size * (0.42 - step * 0.1), base - size * (0.25 + step * 0.28)
            draw.polygon([(x - half, top + size * 0.3), (x + half, top + size * 0.3), (x, top - 20)], fill=(40, 92, 84))
            draw.polygon([(x - half * 0.35, top + 4), (x + half * 0.35, top + 4), (x, top - 22)], fill=(240, 246, 255))
    draw.ellipse((-140, 310, 330, 600), fill=(214, 224, 246))
    draw.ellipse((200, 330, 700, 640), fill=(230, 238, 252))
    place = _blurred(place, 2.5)
    draw = ImageDraw.Draw(place)
    for i in range(60):
        x, y, r = (i * 197) % _CANVAS, (i * 283 + i * i) % _CANVAS, 3 + i % 3 * 2
        draw.ellipse((x - r, y - r, x + r, y + r), fill="white")
    return place


def _bookshelf() -> Image.Image:
    place, draw = _ground((94, 66, 58), (78, 54, 50), 400, (186, 126, 80), (160, 104, 66))
    draw.rectangle((0, 0, _CANVAS, 26), fill=(172, 116, 74))
    x = 8
    colours = [
        (196, 76, 64),
        (58, 92, 150),
        (226, 178, 72),
        (92, 132, 88),
        (142, 84, 140),
        (236, 224, 200),
        (72, 72, 92),
    ]
    for i in range(14):
        width, top = 30 + (i * 13) % 24, 90 + (i * 47) % 90
        if not 150 < x < 300:
            draw.rectangle((x, top, x + width, 402), fill=colours[i % 7])
            draw.rectangle((x, top + 30, x + width, top + 44), fill=(246, 232, 190))
            draw.rectangle((x, 360, x + width, 368), fill=(246, 232, 190))
        x += width + 4
    place = _blurred(place, 3)
    draw = ImageDraw.Draw(place)
    draw.rectangle((0, 484, _CANVAS, _CANVAS), fill=(128, 80, 48))
    draw.rectangle((0, 478, _CANVAS, 486), fill=(214, 154, 104))
    draw.polygon([(420, 380), (492, 380), (482, 452), (430, 452)], fill=(214, 110, 74))  # plant
    draw.rectangle((414, 372, 498, 392), fill=(232, 128, 90))
    for angle in (-60, -30, 0, 30, 60):
        turn = math.radians(angle)
        tip = 456 + 110 * math.sin(turn), 372 - 110 * math.cos(turn)
        side = 16 * math.cos(turn), 16 * math.sin(turn)
        middle = (456 + tip[0]) / 2, (372 + tip[1]) / 2
        leaf = [(456, 372), (middle[0] + side[0], middle[1] + side[1]), tip, (middle[0] - side[0], middle[1] - side[1])]
        draw.polygon(leaf, fill=(70, 152, 84))
    return place

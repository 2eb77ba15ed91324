"""Shapes filled at four times the image's resolution, in arithmetic that gives the same bits on every machine.

Only +, -, *, / and comparisons of float64 decide which samples a shape covers: no library's polygon filler, whose
rounding differs between versions and machines, and no sine without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ether_diffusion.tinyworld.scenes import RGB, SIZE

SAMPLES = 4  # per side of a pixel
SIDE = SIZE * SAMPLES  # of the canvas, in samples

Point = tuple[float, float]

_CENTRES = np.arange(SIDE) + 0.5


@dataclass(frozen=True)
class Region:
    """Samples of the canvas: a window, and which of its samples belong to the region (H, W), bool."""

    top: int
    left: int
    mask: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the window on the canvas."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def within(self, other: Region) -> Region:
        """The samples that both regions have."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = max(top, min(self.window[0].stop, other.window[0].stop))
        right = max(left, min(self.window[1].stop, other.window[1].stop))
        ours, theirs = (
            part.mask[top - part.top : bottom - part.top, left - part.left : right - part.left]
            for part in (self, other)
        )
        return Region(top, left, ours & theirs)

    def grown(self, radius: int) -> Region:
        """The region with every sample within about `radius` of it."""
        height, width = self.mask.shape
        grown = np.zeros((height + 2 * radius, width + 2 * radius), bool)
        diagonal = round(radius * 0.7)
        steps = [(radius, 0), (-radius, 0), (0, radius), (0, -radius), (0, 0)]
        steps += [(y, x) for y in (-diagonal, diagonal) for x in (-diagonal, diagonal)]
        for y, x in steps:
            grown[radius + y : radius + y + height, radius + x : radius + x + width] |= self.mask
        top, left = max(0, self.top - radius), max(0, self.left - radius)
        cut = grown[top - self.top + radius :, left - self.left + radius :]
        return Region(top, left, cut[: SIDE - top, : SIDE - left])


def polygon(points: Sequence[Point]) -> Region:
    """The samples inside a closed line in canvas coordinates (x right, y down), by the even-odd rule."""
    xs, ys = zip(*points, strict=True)
    left, right, top, bottom = (
        min(SIDE, max(0, math.ceil(edge - 0.5))) for edge in (min(xs), max(xs), min(ys), max(ys))
    )
    height, width = bottom - top, right - left
    x, y = np.array((*xs, xs[0])), np.array((*ys, ys[0]))
    rows = _CENTRES[top:bottom]
    below = y <= rows[:, None]  # (H, corners + 1)
    row, edge = (below[:, 1:] != below[:, :-1]).nonzero()
    slope = (x[1:] - x[:-1])[edge] / (y[1:] - y[:-1])[edge]
    crossing = x[edge] + (rows[row] - y[edge]) * slope
    column = np.ceil(np.minimum(np.maximum(crossing - 0.5, left), right)).astype(np.int64) - left
    toggles = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).astype(np.uint8)
    inside = np.add.accumulate(toggles.reshape(height, width + 1), 1, np.uint8) & 1
    return Region(top, left, inside[:, :width].astype(bool))


# Rounded, so that the last bit of a machine's sine never decides whether a sample is covered.
CIRCLE: tuple[Point, ...] = tuple(
    (round(math.cos(math.tau * k / 32), 6), round(math.sin(math.tau * k / 32), 6)) for k in range(32)
)


def turned(degrees: float) -> Point:
    """(cosine, sine) of an angle, rounded as in `CIRCLE`."""
    return round(math.cos(math.radians(degrees)), 6), round(math.sin(math.radians(degrees)), 6)


def mix(colour: RGB, other: RGB, share: float) -> RGB:
    """From `colour` (0) to `other` (1)."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def light(colour: RGB, share: float = 0.35) -> RGB:
    """Mixed with white."""
    return mix(colour, (255, 255, 255), share)


def dark(colour: RGB, share: float = 0.3) -> RGB:
    """Mixed with a dark blue."""
    return mix(colour, (16, 14, 26), share)


class Canvas:
    """`samples` (SIDE, SIDE, 4) uint8: red, green, blue and label of each."""

    def __init__(self) -> None:
        self.samples = np.zeros((SIDE, SIDE, 4), np.uint8)
        self._whole = self.samples.view(np.uint32)[..., 0]  # one number per sample

    def paint(self, region: Region, colour: RGB, label: int) -> None:
        """Fill a region."""
        np.copyto(self._whole[region.window], _packed(colour, label), where=region.mask)

    def lay(self, other: Canvas, region: Region) -> None:
        """Copy a region of another canvas."""
        np.copyto(self._whole[region.window], other._whole[region.window], where=region.mask)

    def tint(self, region: Region, colour: RGB, share: float) -> None:
        """Mix a colour into a region, whose labels stay."""
        there = self.samples[region.window]
        weight = round(share * 256)
        mixed = there[region.mask][:, :3].astype(np.int32) * (256 - weight) + np.array(colour, np.int32) * weight
        there[region.mask, :3] = ((mixed + 128) >> 8).astype(np.uint8)

    def ramp(self, top: float, bottom: float, first: RGB, last: RGB, label: int) -> None:
        """Fill rows from `top` to `bottom`, shares of the height, with a gradient."""
        start, stop = round(top * SIDE), round(bottom * SIDE)
        share = (np.arange(stop - start) * 2 + 1)[:, None]  # of `whole`
        whole = 2 * max(1, stop - start)
        rows = np.full((stop - start, 4), label, np.uint8)
        rows[:, :3] = (np.array(first) * (whole - share) + np.array(last) * share + whole // 2) // whole
        self._whole[start:stop] = rows.view(np.uint32)

    def box(self, top: int, left: int, bottom: int, right: int, colour: RGB, label: int) -> None:
        """Fill a box of samples; the part off the canvas is ignored."""
        self._whole[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = _packed(colour, label)

    def labelled(self) -> Region:
        """All samples with a label."""
        labels = self.samples[..., 3] != 0
        rows, columns = labels.any(1).nonzero()[0], labels.any(0).nonzero()[0]
        top, left = int(rows[0]), int(columns[0])
        return Region(top, left, labels[top : rows[-1] + 1, left : columns[-1] + 1])

    def pixels(self) -> np.ndarray:
        """(SIZE, SIZE, 3) uint8: the mean of each pixel's samples."""
        down = _sum(self.samples.reshape(SIZE, SAMPLES, SIDE, 4), 1)
        sums = _sum(down.reshape(SIZE, SIZE, SAMPLES, 4), 2)[..., :3]
        return ((sums + SAMPLES * SAMPLES // 2) // (SAMPLES * SAMPLES)).astype(np.uint8)

    def label_map(self, count: int) -> np.ndarray:
        """(SIZE, SIZE) uint8: the most frequent label of each pixel's samples, on a tie the smallest."""
        pixels = np.arange(SIZE)
        pixel = np.repeat(pixels, SAMPLES)[:, None] * SIZE + np.repeat(pixels, SAMPLES)
        votes = np.bincount((pixel * count + self.samples[..., 3]).ravel(), minlength=SIZE * SIZE * count)
        return votes.reshape(SIZE, SIZE, count).argmax(-1).astype(np.uint8)


def _packed(colour: RGB, label: int) -> np.uint32:
    return np.array((*colour, label), np.uint8).view(np.uint32)[0]


def _sum(samples: np.ndarray, axis: int) -> np.ndarray:
    """Sum along a short axis, where adding slices is ten times as fast as `sum`."""
    parts = np.moveaxis(samples.astype(np.uint16), axis, 0)
    return parts[0] + parts[1] + parts[2] + parts[3]


class Pen:
    """Paints on a canvas in a thing's own coordinates: x to its right, y up from its foot, in units of its size."""

    def __init__(
        self, canvas: Canvas, label: int, x: float, y: float, size: float, *, flip: bool = False, tilt: float = 0.0
    ) -> None:
        self._canvas, self._label = canvas, label
        self._origin = x * SIDE, y * SIDE
        self._scale = size * SIDE
        self._cosine, self._sine = turned(tilt)
        self._mirror = -1 if flip else 1

    def at(self, x: float, y: float) -> Point:
        """A point's place on the canvas."""
        x *= self._mirror
        along, up = x * self._cosine + y * self._sine, y * self._cosine - x * self._sine
        return self._origin[0] + self._scale * along, self._origin[1] - self._scale * up

    def polygon(self, points: Sequence[Point], colour: RGB, within: Region | None = None) -> Region:
        """Fill the inside of a closed line; `within` limits it to a region."""
        region = polygon([self.at(x, y) for x, y in points])
        if within is not None:
            region = region.within(within)
        self._canvas.paint(region, colour, self._label)
        return region

    def ellipse(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: RGB,
        *,
        turn: float = 0,
        within: Region | None = None,
    ) -> Region:
        """`width` and `height` are half its axes; `turn` in degrees, clockwise."""
        return self.polygon(oval(x, y, width, height, turn), colour, within)

    def row(
        self, xs: Sequence[float], y: float, width: float, height: float, colour: RGB, within: Region | None = None
    ) -> None:
        """The same ellipse at each of `xs`."""
        for x in xs:
            self.ellipse(x, y, width, height, colour, within=within)

    def box(
        self, left: float, bottom: float, right: float, top: float, colour: RGB, within: Region | None = None
    ) -> Region:
        """An upright rectangle."""
        return self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour, within)

    def rounded(self, left: float, bottom: float, right: float, top: float, radius: float, colour: RGB) -> Region:
        """A box with round corners."""
        points = []
        for k, (cosine, sine) in enumerate(CIRCLE):
            corner_x = right - radius if k < 8 or k >= 24 else left + radius
            corner_y = top - radius if k < 16 else bottom + radius
            points.append((corner_x + radius * cosine, corner_y + radius * sine))
        return self.polygon(points, colour)

    def ring(self, x: float, y: float, outer: float, inner: float, colour: RGB) -> Region:
        """A circle with a hole, both given by their radius."""
        outside, inside = oval(x, y, outer, outer), oval(x, y, inner, inner)
        return self.polygon([*outside, outside[0], *inside, inside[0]], colour)  # even-odd: the bridge cancels itself

    def stroke(self, points: Sequence[Point], width: float, colour: RGB, within: Region | None = None) -> None:
        """A line with round ends and joints."""
        for (x, y), (next_x, next_y) in pairwise(points):
            length = math.sqrt((next_x - x) ** 2 + (next_y - y) ** 2)
            across, up = (y - next_y) / length * width / 2, (next_x - x) / length * width / 2
            side = [(x + across, y + up), (x - across, y - up)]
            self.polygon([*side, (next_x - across, next_y - up), (next_x + across, next_y + up)], colour, within)
        for x, y in points:
            self.ellipse(x, y, width / 2, width / 2, colour, within=within)


def oval(x: float, y: float, width: float, height: float, turn: float = 0) -> list[Point]:
    """The outline of an ellipse."""
    cosine, sine = turned(turn)
    return [(x + width * a * cosine + height * b * sine, y - width * a * sine + height * b * cosine) for a, b in CIRCLE]

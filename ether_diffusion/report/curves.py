"""Loss curves as inline SVG: each value averaged over its neighbours, with the single steps faintly behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .markup import Markup, element

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#666666")
"""Okabe and Ito's, which the colour-blind tell apart, without those too pale for a line on white."""
DASHES = (None, "7 3", "2 3")
POINTS, WINDOW = 300, 25  # points of a drawn line; a run is smoothed over a WINDOWth of its length
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 280, 58, 24, 12, 42


@dataclass(frozen=True)
class Series:
    """One line: values over steps. A value that is not finite is a gap."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def smoothed(values: npt.ArrayLike, window: int) -> np.ndarray:
    """Each value's mean with its neighbours up to `window // 2` away on both sides, over those that are finite."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre, half = np.arange(len(array)), window // 2
    start, stop = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(array))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
    return np.where(known, means, np.nan)


def chart(title: str, series: Sequence[Series]) -> Markup | None:
    """A figure with the lines and a legend; None if there is nothing to draw."""
    drawn = [(one, _lines(one)) for one in series if np.isfinite(np.asarray(one.values, dtype=np.float64)).any()]
    if not drawn:
        return None
    steps = np.concatenate([x for _, (x, _, _) in drawn])
    heights = np.concatenate([y for _, (_, *both) in drawn for y in both])
    x_axis, y_axis = _Axis(steps, LEFT, WIDTH - RIGHT, least=1), _Axis(heights, HEIGHT - BOTTOM, TOP)
    parts, legend = [_grid(x_axis, y_axis)], []
    for k, (one, (x, single, smooth)) in enumerate(drawn):
        style = {"stroke": COLOURS[k % len(COLOURS)], "fill": "none"}
        dash = DASHES[k // len(COLOURS) % len(DASHES)]
        parts.append(element("path", d=_path(x, single, x_axis, y_axis), stroke_opacity="0.25", **style))
        parts.append(
            element("path", d=_path(x, smooth, x_axis, y_axis), stroke_width="2", stroke_dasharray=dash, **style)
        )
        key = element("path", d="M 0 6 H 22", stroke_width="3", stroke_dasharray=dash, **style)
        legend.append(element("span", element("svg", key, width="22", height="12", aria_hidden="true"), " ", one.name))
    svg = element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=WIDTH,
        role="img",
        aria_label=title,
    )
    return element("figure", element("figcaption", title, element("span", *legend, class_="legend")), svg)


class _Axis:
    """From values to places in the picture, with round ticks, `least` apart or more."""

    def __init__(self, values: np.ndarray, start: float, stop: float, least: float = 0.0) -> None:
        finite = values[np.isfinite(values)]
        low, high = float(finite.min()), float(finite.max())
        if high - low <= 1e-9 * max(abs(high), 1e-9):
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high, self.start, self.stop = low, high, start, stop
        raw = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = max(least, next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw))
        self.ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def _lines(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, single values and smoothed values, at most `POINTS` of each: means of equal stretches."""
    steps = np.asarray(series.steps, dtype=np.float64)
    single = np.asarray(series.values, dtype=np.float64)
    single = np.where(np.isfinite(single), single, np.nan)
    smooth = smoothed(single, max(1, len(single) // WINDOW))
    if len(steps) <= POINTS:
        return steps, single, smooth
    edges = np.linspace(0, len(steps), POINTS + 1).astype(int)

    def means(values: np.ndarray) -> np.ndarray:
        # A stretch with one gap in it shows the gap.
        return np.add.reduceat(values, edges[:-1]) / np.diff(edges)

    return means(steps), means(single), means(smooth)


def _path(x: np.ndarray, y: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> str:
    words, pen = [], "M"
    for step, value in zip(x, y, strict=True):
        if math.isnan(value):
            pen = "M"
            continue
        # The line of no length shows a value between two gaps as a dot.
        words.append(f"{pen} {x_axis(step):.1f} {y_axis(value):.1f}{' h 0' * (pen == 'M')}")
        pen = "L"
    return " ".join(words) or "M 0 0"


def _grid(x_axis: _Axis, y_axis: _Axis) -> Markup:
    parts = []
    for tick in y_axis.ticks:
        y = f"{y_axis(tick):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke="#ddd"))
        parts.append(element("text", f"{tick:g}", x=LEFT - 8, y=y, text_anchor="end", dominant_baseline="middle"))
    for tick in x_axis.ticks:
        x = f"{x_axis(tick):.1f}"
        parts.append(element("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 5, stroke="#999"))
        parts.append(element("text", f"{tick:,g}", x=x, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    parts.append(element("text", "step", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    return element("g", *parts, fill="#666", font_size=12)

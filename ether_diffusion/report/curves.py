"""Loss curves: the lines, ticks and legend of a chart; `parts.html` writes it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#666666")
"""Okabe and Ito's palette for all colour vision, without the colours that are too pale for a line on white."""
DASHES = (None, "7 3", "2 3")
POINTS, WINDOW = 300, 25  # most points of a plotted line; the smoothing window is a WINDOWth of the run


@dataclass(frozen=True)
class Series:
    """Values over steps. A value that is not finite is a gap."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Line:
    """A series as two SVG paths: the smoothed values, and behind them the single values."""

    name: str
    colour: str
    dash: str | None
    single: str
    smooth: str


@dataclass(frozen=True)
class Chart:
    """Lines over steps in a frame. All places are in the units of the SVG's view box."""

    width: ClassVar[int] = 720
    height: ClassVar[int] = 280
    left: ClassVar[int] = 58
    right: ClassVar[int] = 696
    top: ClassVar[int] = 12
    bottom: ClassVar[int] = 238

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[str, str], ...]
    """Place and label of each."""
    y_ticks: tuple[tuple[str, str], ...]


def smoothed(values: npt.ArrayLike, window: int) -> np.ndarray:
    """The mean of each value and its neighbours up to `window // 2` away on either side; gaps count for nothing."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre, half = np.arange(len(array)), window // 2
    start, stop = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(array))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
    return np.where(known, means, np.nan)


def chart(title: str, series: Sequence[Series]) -> Chart | None:
    """A chart of the series; None if no value is finite."""
    points = [(one.name, *_points(one)) for one in series if np.isfinite(np.asarray(one.values, np.float64)).any()]
    if not points:
        return None
    steps = np.concatenate([x for _, x, _, _ in points])
    values = np.concatenate([y for _, _, *both in points for y in both])
    x_axis = _Axis(steps, Chart.left, Chart.right, least=1)
    y_axis = _Axis(values, Chart.bottom, Chart.top)
    lines = [
        Line(
            name,
            COLOURS[k % len(COLOURS)],
            DASHES[k // len(COLOURS) % len(DASHES)],
            _path(x, single, x_axis, y_axis),
            _path(x, smooth, x_axis, y_axis),
        )
        for k, (name, x, single, smooth) in enumerate(points)
    ]
    x_ticks = tuple((f"{x_axis(tick):.1f}", f"{tick:,g}") for tick in x_axis.ticks)
    y_ticks = tuple((f"{y_axis(tick):.1f}", f"{tick:g}") for tick in y_axis.ticks)
    return Chart(title, tuple(lines), x_ticks, y_ticks)


class _Axis:
    """Maps values to places in the picture; its ticks are round numbers, at least `least` apart."""

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


def _points(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, single values and smoothed values; of a long series, `POINTS` means of equal stretches of each."""
    steps = np.asarray(series.steps, dtype=np.float64)
    single = np.asarray(series.values, dtype=np.float64)
    single = np.where(np.isfinite(single), single, np.nan)
    smooth = smoothed(single, max(1, len(single) // WINDOW))
    if len(steps) <= POINTS:
        return steps, single, smooth
    edges = np.linspace(0, len(steps), POINTS + 1).astype(int)
    # The mean of a stretch with a gap in it is nan, a gap.
    first, second, third = (np.add.reduceat(one, edges[:-1]) / np.diff(edges) for one in (steps, single, smooth))
    return first, second, third


def _path(x: np.ndarray, y: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> str:
    words, pen = [], "M"
    for step, value in zip(x, y, strict=True):
        if math.isnan(value):
            pen = "M"
            continue
        # A line of length zero shows a value between two gaps as a dot.
        words.append(f"{pen} {x_axis(step):.1f} {y_axis(value):.1f}{' h 0' * (pen == 'M')}")
        pen = "L"
    return " ".join(words) or "M 0 0"

"""The plots of the analyses, with the paper's numbers where there are any."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .analysed_run import APART, Row, labels
from .output import FAINT, INK, line_style
from .published import DISTANCE_RATES, DISTANCES, ENERGY_CHANGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def by(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    """Group rows by the value of one column, in the order of their first appearance."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[name]].append(row)
    return dict(groups)


def curve(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """y over x in increasing order. Rows of one x, such as seeds, are averaged; unknown numbers are left out."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if not (math.isnan(row[x]) or math.isnan(row[y])):
            found[row[x]].append(row[y])
    return sorted(found), [math.fsum(found[value]) / len(found[value]) for value in sorted(found)]


# Lines and markers of a method's second and further series. Dashes are the paper's.
LINES = ("-", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
FILLS = ("full", "none", "left", "bottom", "right")


@dataclass(frozen=True)
class Series:
    """Rows of runs that differ in seed and learning rate only.

    Attributes:
        label: For the legend: the method, and the settings in which it differs from its other series.
        style: The method's colour and marker; further series of it have other lines and fillings.
    """

    method: str
    label: str
    rows: list[Row]
    style: dict[str, Any]


def series(rows: Sequence[Row]) -> list[Series]:
    """Group rows by method and setup (`setups.APART`), in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[tuple[str, Row]]] = defaultdict(list)
    for label, row in zip(labels(rows), rows, strict=True):
        groups[tuple(row.get(name) for name in ("method", *APART))].append((label, row))
    found: list[Series] = []
    for (method, *_), members in groups.items():
        place = sum(one.method == method for one in found)
        other = {"linestyle": LINES[place % len(LINES)], "fillstyle": FILLS[place % len(FILLS)]} if place else {}
        found.append(Series(method, members[0][0], [row for _, row in members], {**line_style(method), **other}))
    return found


def transforms_by_rate(axes: Axes, rows: Sequence[Row]) -> None:
    """Plot mean ||T - I||_F over the learning rate, ours solid, the paper's dashed (Fig. 4)."""
    found = [one for one in series(rows) if curve(one.rows, "learning_rate", "transform")[0]]
    for one in found:
        axes.plot(*curve(one.rows, "learning_rate", "transform"), label=one.label, **one.style)
    methods = {one.method for one in found}
    for title in [title for title in DISTANCES if title in methods] or list(DISTANCES):
        style = {"color": line_style(title)["color"], "linestyle": (0, (4, 3)), "linewidth": 1, "alpha": 0.75}
        axes.plot(DISTANCE_RATES, DISTANCES[title], label=f"{title}, paper (SD 1.5)", **style)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=r"$\|T - I\|_F$, mean over transforms")
    plain_log(axes.yaxis)
    axes.set_title("Distance of the transforms from the identity")
    axes.legend()


def weights_by_rate(axes: Axes, rows: Sequence[Row]) -> None:
    """Plot mean ||W' - W||_F over the learning rate."""
    for one in series(rows):
        axes.plot(*curve(one.rows, "learning_rate", "weight"), label=one.label, **one.style)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=r"$\|W' - W\|_F$, mean over layers")
    plain_log(axes.yaxis)
    axes.set_title("Distance of the weights from the base's")
    axes.legend()


def layers(axes: Axes, rows: Sequence[Row], value: str, label: str) -> None:
    """Plot one number of every layer, in the order of the network; a method's higher rates are darker."""
    runs = by(rows, "run")
    names = labels([found[0] for found in runs.values()], (*APART, "seed"))
    for name, (run, found) in zip(names, runs.items(), strict=True):
        title, rate = found[0]["method"], found[0]["learning_rate"]
        alike = [other for other in runs.values() if other[0]["method"] == title]
        place = sorted(alike, key=lambda other: other[0]["learning_rate"]).index(found)
        values = [row[value] for row in found]
        style = {**line_style(title), "alpha": 0.25 + 0.75 * (place + 1) / len(alike)}
        name = f"{name}, {run}" if math.isnan(rate) else f"{name}, rate {rate:g}"
        axes.plot(range(1, len(values) + 1), values, label=name, linestyle="", markersize=3.4, **style)
    axes.set(ylabel=label, yscale="log")
    plain_log(axes.yaxis)


def energy(axes: Axes, rows: Sequence[Row]) -> None:
    """Plot the change of hyperspherical energy over training, a line for each run; the paper's ends dotted (Fig. 7)."""
    runs = by(rows, "run")
    titles = [found[0]["method"] for found in runs.values()]
    seen: dict[str, int] = defaultdict(int)
    for run, found in runs.items():
        title = found[0]["method"]
        label = title if titles.count(title) == 1 else f"{title}, {run}"
        style = {**line_style(title), "linestyle": ("-", "--", "-.", ":")[seen[title] % 4]}
        seen[title] += 1
        axes.plot([row["step"] for row in found], [row["mean_change"] for row in found], label=label, **style)
    paper = {title: ENERGY_CHANGES[title] for title in dict.fromkeys(titles) if ENERGY_CHANGES.get(title)}
    for title, value in paper.items():
        colour = line_style(title)["color"]
        axes.axhline(value, color=colour, linestyle=":", linewidth=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        text = f"{title} in the paper: {value:g} (SD 1.5, 1,400 steps)"
        axes.annotate(text, (0.99, value), xytext=(0, 3), color=colour, fontsize=8, **place)
    changes = [row["mean_change"] for row in rows]
    if paper and max(map(abs, changes), default=0) > 20 * min(paper.values()):
        linear = min(paper.values()) / 2
        axes.set_yscale("symlog", linthresh=linear, linscale=0.4)
        if min(changes) > -linear / 2:
            axes.set_ylim(bottom=-linear / 2)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.set(xlabel="training step", ylabel="sum over layers of the mean over pairs of 1 / distance")
    axes.set_title("Change of hyperspherical energy")
    legend_below(axes)


def strength(axes: Axes, rows: Sequence[Row], value: str, label: str, unperturbed: float | None) -> None:
    """Plot a score of perturbed bases over the distance of their transforms, the unperturbed base as a line."""
    if unperturbed is not None:
        axes.axhline(unperturbed, color=INK, linestyle=":", linewidth=1, label="unperturbed base")
    for title, found in by(rows, "method").items():
        points = [row for row in found if not math.isnan(row[value])]
        style = line_style(title)
        axes.plot(*curve(points, "distance", value), label=title, **style)
        xs = sorted({row["distance"] for row in points})
        low, high = ([f(row[value] for row in points if row["distance"] == x) for x in xs] for f in (min, max))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel=r"$\|T - I\|_F$ of every transform", ylabel=label)
    ticks = sorted({row["distance"] for row in rows})
    plain_log(axes.xaxis, ticks)


def grid(axes: Sequence[Axes], rows: Sequence[tuple[str, Mapping[float, Any]]], distances: Sequence[float]) -> None:
    """Show images by row and distance; cells without an image stay empty.

    Args:
        axes: Of all cells, row by row, with one column more than distances: the first is for the base's own image.
        rows: Labels, and images by distance, including 0.
    """
    for k, (label, images) in enumerate(rows):
        for column, distance in enumerate((0.0, *distances)):
            cell = axes[k * (len(distances) + 1) + column]
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            cell.spines[:].set_visible(False)
            if k == 0:
                cell.set_title(f"{distance:.3g}" if column else "base", loc="center", fontsize=9)
            if column == 0:
                cell.set_ylabel(label, fontsize=9)
            if distance in images:
                cell.imshow(images[distance], interpolation="nearest")
            else:
                cell.set_box_aspect(1)
    axes[0].figure.supxlabel(r"$\|T - I\|_F$ of every transform", fontsize=9)  # pyright: ignore


def legend_below(axes: Axes) -> None:
    """Put the legend under the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))  # pyright: ignore


def plain_log(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Label a logarithmic axis with 0.05, 2 and 100, and add ticks between powers of ten if few of these fit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    steps = (1.0,) if high > 300 * low > 0 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps) if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(NullLocator())

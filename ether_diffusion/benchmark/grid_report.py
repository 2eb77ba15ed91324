"""Tables and plots of a grid: metrics along each axis beside published values, and against the training's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.analysis.output import FAINT, line_style, plot, write_table
from ether_diffusion.files import write_whole
from ether_diffusion.report.tables import Cell, Table, Value, to_markdown

from .grid import Summary, best_points, grid_part, last_step, read_grid, shown_metrics
from .grid_config import Coordinate, GridConfig, Reference, short, told
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIVERGED, WAITING = "diverged", "…"
LOGARITHMIC = 20
"""An axis with numbers above 0 whose largest is so many times its smallest is drawn in powers of ten."""


def write_grid(config: GridConfig, task: str, command: str) -> list[Path]:
    """Write `grid.csv`, `grid.md`, a plot for each axis, and one against steps where several checkpoints are scored.

    Returns:
        What was written into OUTPUT/TASK; nothing as long as no cell is scored or diverged.
    """
    summaries, metrics = read_grid(config, task), shown_metrics(config, task)
    if not any(one.scored or one.diverged for one in summaries):
        return []
    part, folder = grid_part(config, task), config.output_dir / task
    axes = {axis: _coordinates(summaries, axis) for axis in part.grid.axes}
    files = [write_table(folder / "grid.csv", csv_rows(config, task, summaries)), folder / "grid.md"]
    tables = [_along_first_axis(config, task, summaries, name) for name in metrics]
    tables += [_along_steps(config, task, summaries, name) for name in metrics if part.also_checkpoints]
    protocol = Plan(config).part(task)[1].name
    write_whole(files[1], f"# {task} along a grid, {protocol}\n\n`{command}`\n\n{to_markdown(tables)}")
    styles = _styles(config, task)
    for axis in [axis for axis, values in axes.items() if len(values) > 1]:
        with plot(folder / short(axis), command, columns=len(metrics), size=_size(1, len(metrics))) as panels:
            for panel, name in zip(panels, metrics, strict=True):
                references = [one for one in part.grid.references if (one.axis, one.metric) == (axis, name)]
                _draw_axis(panel, axis, axes[axis], name, metrics[name], summaries, references, styles)
            handles, labels = max(
                (panel.get_legend_handles_labels() for panel in panels), key=lambda found: len(found[1])
            )
            panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(metrics))
        files += [folder / f"{short(axis)}.{kind}" for kind in ("png", "svg")]
    if part.also_checkpoints and (last := last_step(config, task)) is not None:
        methods = list(part.methods)
        size = _size(len(metrics), len(methods))
        with plot(
            folder / "steps", command, rows=len(metrics), columns=len(methods), size=size, sharex=True, sharey="row"
        ) as panels:
            pairs = [(name, method) for name in metrics for method in methods]
            for panel, (name, method) in zip(panels, pairs, strict=True):
                _draw_steps(panel, method, name, metrics[name], summaries, last)
        files += [folder / f"steps.{kind}" for kind in ("png", "svg")]
    return files


def csv_rows(config: GridConfig, task: str, summaries: Sequence[Summary]) -> list[dict[str, object]]:
    """A row for each point and step: means over seeds, their ranges, and what was published of the point."""
    part, metrics, last = grid_part(config, task), shown_metrics(config, task), last_step(config, task)
    rows = []
    for one in summaries:
        row: dict[str, object] = {"method": one.method}
        row |= {short(axis): one.at(axis) for axis in part.grid.axes}
        row |= {"step": one.step or last, "scored": one.scored, "diverged": one.diverged, "waiting": one.waiting}
        for name in metrics:
            spread = one.values.get(name)
            row |= {name: spread.mean if spread else None}
            if len(part.grid.seeds) > 1:
                row |= {f"{name} low": spread.low if spread else None, f"{name} high": spread.high if spread else None}
            for reference in part.grid.references:
                if reference.metric == name:
                    row[f"{name} ({reference.source})"] = None if one.step else _published(reference, one)
        rows.append(row)
    return rows


def _along_first_axis(config: GridConfig, task: str, summaries: Sequence[Summary], name: str) -> Table:
    """A row for each method and its other coordinates, a column for each value of the first axis."""
    grid, better = grid_part(config, task).grid, shown_metrics(config, task)[name]
    axis = next(iter(grid.axes))
    references = [one for one in grid.references if (one.axis, one.metric) == (axis, name)]
    shown = [one for one in summaries if one.step is None]
    columns = _ordered([*_coordinates(shown, axis), *(value for one in references for value in one.at)])
    best = best_points(shown, name, better)
    rows: dict[str, dict[Coordinate | None, Cell]] = {}
    for one in shown:
        cells = rows.setdefault(_label(one, axis), {})
        cell = _cell(one, name, best=best.get(one.method) == one)
        own = one.at(axis)
        cells |= dict.fromkeys(columns, cell) if own is None else {own: cell}
    for reference in references:
        for method, values in reference.values.items():
            rows[f"{method}: {reference.source}"] = {
                at: Value(value) for at, value in zip(reference.at, values, strict=True)
            }
    body = tuple((label, *(cells.get(column, "") for column in columns)) for label, cells in rows.items())
    note = f"{_better(better)}; each method's best is bold. {_seeds(grid.seeds)}"
    return Table(f"{name} by {short(axis)}", ("", *map(told, columns)), body, note)


def _along_steps(config: GridConfig, task: str, summaries: Sequence[Summary], name: str) -> Table:
    part, last = grid_part(config, task), last_step(config, task)
    steps = dict.fromkeys(one.step for one in summaries)
    rows: dict[str, list[Cell]] = {}
    for one in summaries:
        rows.setdefault(_label(one), []).append(_cell(one, name))
    columns = ("", *(f"step {step or last or 'last'}" for step in steps))
    note = f"{_better(shown_metrics(config, task)[name])}. {_seeds(part.grid.seeds)}"
    return Table(f"{name} by steps", columns, tuple((label, *cells) for label, cells in rows.items()), note)


def _draw_axis(
    panel: Axes,
    axis: str,
    values: Sequence[Coordinate],
    name: str,
    higher: bool,
    summaries: Sequence[Summary],
    references: Sequence[Reference],
    styles: dict[str, dict[str, Any]],
) -> None:
    everything = _ordered([*values, *(value for one in references for value in one.at)])
    place = _scale(panel, everything)
    lines: dict[str, list[Summary]] = {}
    for one in summaries:
        if one.step is None and one.at(axis) is not None:
            lines.setdefault(_label(one, axis), []).append(one)
    dashes = ["-", "--", ":", "-."]
    for label, points in lines.items():
        style, method = styles[points[0].method], points[0].method
        turn = [key for key, others in lines.items() if others[0].method == method].index(label)
        scored = sorted((one for one in points if one.scored), key=lambda one: place(one.at(axis)))
        where = [place(one.at(axis)) for one in scored]
        means = [one.values[name].mean for one in scored]
        panel.plot(where, means, label=label, linestyle=dashes[turn % len(dashes)], **style)
        if any(one.scored > 1 for one in scored):
            low, high = ([getattr(one.values[name], end) for one in scored] for end in ("low", "high"))
            panel.fill_between(where, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lost = [place(one.at(axis)) for one in points if one.diverged]
        panel.plot(lost, [0.02] * len(lost), "x", color=style["color"], transform=panel.get_xaxis_transform())
    for reference in references:
        for method, numbers in reference.values.items():
            where = [place(value) for value in reference.at]
            style = styles.get(method) or line_style(method)
            faint = {**style, "alpha": 0.45, "linestyle": (0, (1, 1.5)), "markerfacecolor": "white", "linewidth": 1.2}
            panel.plot(where, numbers, label=f"{method}, {reference.source}", **faint)
    panel.set_title(f"{name}, {_better(higher)}")
    panel.set_xlabel(short(axis).replace("_", " "))
    if any(one.diverged for one in summaries):
        panel.plot([], [], "x", color=FAINT, label="diverged")


def _draw_steps(panel: Axes, method: str, name: str, higher: bool, summaries: Sequence[Summary], last: int) -> None:
    import matplotlib

    points = list(dict.fromkeys(one.point for one in summaries if one.method == method))
    colours = matplotlib.colormaps["viridis"].resampled(max(len(points), 2) + 1)
    for number, point in enumerate(points):
        found = sorted(
            (one.step or last, one.values[name])
            for one in summaries
            if one.method == method and one.point == point and one.scored
        )
        label = ", ".join(f"{short(axis).replace('_', ' ')} {told(value)}" for axis, value in point) or method
        steps = [step for step, _ in found]
        panel.plot(steps, [one.mean for _, one in found], "o-", color=colours(number), label=label, markersize=3.5)
        if any(one.low < one.high for _, one in found):
            low, high = [one.low for _, one in found], [one.high for _, one in found]
            panel.fill_between(steps, low, high, color=colours(number), alpha=0.15, linewidth=0)
    panel.set_title(f"{method}: {name}, {_better(higher)}")
    panel.set_xlabel("step")
    panel.legend()


def _scale(panel: Axes, values: Sequence[Coordinate]) -> Any:
    """Set up the x axis; gives where a value lies on it."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        panel.set_xticks(range(len(values)), [told(value) for value in values])
        panel.set_xlim(-0.4, len(values) - 0.6)
        return lambda value: list(values).index(value)
    if min(numbers) > 0 and max(numbers) >= LOGARITHMIC * min(numbers):
        panel.set_xscale("log")
    elif all(math.log2(number).is_integer() for number in numbers if number > 0) and min(numbers) > 0:
        panel.set_xscale("log", base=2)
    if len(numbers) <= 4:
        panel.set_xticks(numbers, [told(value) for value in values])
        panel.minorticks_off()
    return float


def _styles(config: GridConfig, task: str) -> dict[str, dict[str, Any]]:
    """Of each method: that of its title in every plot, or, of a title's second method, another one."""
    plan, part = Plan(config.benchmark()), grid_part(config, task)
    title_of = {unit.method: plan.training(unit).adapter.title for unit in plan.units() if unit.task == task}
    styles, taken = {}, set()
    for cell in part.cells():
        if cell.method not in styles:
            title = title_of[cell.name]
            styles[cell.method] = line_style(cell.method if title in taken else title)
            taken.add(title)
    return styles


def _cell(one: Summary, name: str, best: bool = False) -> Cell:
    if not one.scored:
        return DIVERGED if one.diverged else WAITING
    spread = one.values[name]
    if one.scored == 1:
        return Value(spread.mean, best=best)
    return Value(spread.mean, spread.low, spread.high, best=best)


def _label(one: Summary, axis: str | None = None) -> str:
    """The method, and its coordinates on all axes but one."""
    return ", ".join([one.method, *(f"{short(name)} {told(value)}" for name, value in one.point if name != axis)])


def _published(reference: Reference, one: Summary) -> float | None:
    at = one.at(reference.axis)
    values = dict(zip(reference.at, reference.values.get(one.method, ()), strict=False))
    return None if at is None else values.get(at)


def _coordinates(summaries: Sequence[Summary], axis: str) -> list[Coordinate]:
    return list(dict.fromkeys(value for one in summaries if (value := one.at(axis)) is not None))


def _ordered(values: Iterable[Coordinate]) -> list[Coordinate]:
    """Each once: numbers by size, words as they come."""
    once = list(dict.fromkeys(values))
    return once if any(isinstance(value, str) for value in once) else sorted(once)


def _better(higher: bool) -> str:
    return "higher is better" if higher else "lower is better"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"One seed, {seeds[0]}."
    return f"Mean over {len(seeds)} seeds ({', '.join(map(str, seeds))}), and their range."


def _size(rows: int, columns: int) -> tuple[float, float]:
    return max(4.2 * columns, 5.0), 3.6 * rows

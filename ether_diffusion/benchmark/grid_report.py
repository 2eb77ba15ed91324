"""A grid from end to end; its tables and plots: metrics along each axis next to published values, and by steps.

Learning rates are those of the paper's Fig. 5 and 6, blocks of Table 9, sides of Table 11; any settings are possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.analysis.output import (
    COMMAND,
    FAINT,
    check_matplotlib,
    line_style,
    plot,
    write_command,
    write_table,
)
from ether_diffusion.config import to_yaml
from ether_diffusion.own_files import check_own, write_own
from ether_diffusion.report.tables import Cell, Table, Value, markdown_code, markdown_text, to_markdown, to_text

from .executors import Executor
from .grid import Summary, best_points, grid_part, last_step, read_grid, shown_metrics
from .grid_config import Coordinate, GridConfig, Reference, as_text, short
from .plan import Plan
from .runner import Outcome, run_benchmark, tables_lock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIVERGED, WAITING = "diverged", "…"
DASHES = ("-", "--", ":", "-.")
LOGARITHMIC = 20
"""An axis of positive numbers is logarithmic if the largest is at least this many times the smallest."""


def run_grid(config: GridConfig, command: str, executor: Executor | None = None) -> tuple[Outcome, list[Path]]:
    """Do the cells of a grid as methods of a benchmark; then write tables and plots over all that is done.

    Args:
        command: Reproduces the files; written next to the tables.

    Returns:
        The benchmark's outcome, with the tables of the grid; and the files of the grid, in OUTPUT and OUTPUT/TASK.

    Raises:
        UserError, Interrupted: as `run_benchmark`; or the protocol lacks a metric that the grid names.
    """
    check_matplotlib()
    tasks, folder = Plan(config).tasks, config.output_dir
    for task in tasks:
        shown_metrics(config, task)
        check_own(folder / task / "grid.csv", folder / task / "grid.md")
    check_own(folder / "grid.yaml", folder / COMMAND)
    outcome = run_benchmark(config.benchmark(), executor)
    with tables_lock(config):
        write_own(folder / "grid.yaml", to_yaml(config))
        reports = [_GridReport(config, task, command) for task in tasks]
        reports = [report for report in reports if any(one.scored or one.diverged for one in report.summaries)]
        files = [file for report in reports for file in report.write()]
        write_command(folder, command)
    return replace(outcome, tables={report.task: to_text(report.tables) for report in reports}), files


class _GridReport:
    """The results of one task's grid, and how they are shown."""

    def __init__(self, config: GridConfig, task: str, command: str) -> None:
        self.config, self.task, self.command = config, task, command
        self.part, self.folder = grid_part(config, task), config.output_dir / task
        self.summaries, self.metrics = read_grid(config, task), shown_metrics(config, task)
        self.last = last_step(config, task)
        self.shown = [one for one in self.summaries if one.step is None]

    @cached_property
    def tables(self) -> list[Table]:
        steps = [self._along_steps(name) for name in self.metrics if self.part.also_checkpoints]
        return [*(self._along_first_axis(name) for name in self.metrics), *steps]

    def write(self) -> list[Path]:
        """Write the tables, a plot for each axis, and one against steps if further checkpoints are scored."""
        return [*self.write_tables(), *self.plot_axes(), *self.plot_steps()]

    def write_tables(self) -> list[Path]:
        files = [write_table(self.folder / "grid.csv", self._csv_rows()), self.folder / "grid.md"]
        protocol = Plan(self.config).part(self.task)[1].name
        title = markdown_text(f"{self.task} along a grid, {protocol}")
        write_own(files[1], f"# {title}\n\n{markdown_code(self.command)}\n\n{to_markdown(self.tables)}")
        return files

    def plot_axes(self) -> list[Path]:
        files = []
        for axis in [axis for axis in self.part.grid.axes if len(self._coordinates(axis)) > 1]:
            path, size = self.folder / short(axis), _size(1, len(self.metrics))
            with plot(path, self.command, columns=len(self.metrics), size=size) as panels:
                for panel, name in zip(panels, self.metrics, strict=True):
                    self._plot_axis(panel, axis, name)
                legends = [panel.get_legend_handles_labels() for panel in panels]
                handles, labels = max(legends, key=lambda found: len(found[1]))
                columns = 2 * len(self.metrics)
                panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=columns)
            files += _plot_files(path)
        return files

    def plot_steps(self) -> list[Path]:
        if not self.part.also_checkpoints or self.last is None:
            return []
        pairs = [(name, method) for name in self.metrics for method in self.part.methods]
        path, rows, columns = self.folder / "steps", len(self.metrics), len(self.part.methods)
        shape: dict[str, Any] = {"rows": rows, "columns": columns, "size": _size(rows, columns)}
        with plot(path, self.command, **shape, sharex=True, sharey="row") as panels:
            for panel, (name, method) in zip(panels, pairs, strict=True):
                self._plot_steps(panel, method, name, self.last)
        return _plot_files(path)

    def _csv_rows(self) -> list[dict[str, object]]:
        """A row for each point and step: means over seeds, their ranges, and the published values of the point."""
        rows = []
        for one in self.summaries:
            row: dict[str, object] = {"method": one.method}
            row |= {short(axis): one.at(axis) for axis in self.part.grid.axes}
            row |= {"step": one.step or self.last}
            row |= {"scored": one.scored, "diverged": one.diverged, "waiting": one.waiting}
            for name in self.metrics:
                spread = one.values.get(name)
                row |= {name: spread.mean if spread else None}
                if len(self.part.grid.seeds) > 1:
                    low, high = (spread.low, spread.high) if spread else (None, None)
                    row |= {f"{name} low": low, f"{name} high": high}
                for reference in self.part.grid.references:
                    if reference.metric == name:
                        published = None if one.step else _published(reference, one)
                        row[f"{name} ({reference.source})"] = published
            rows.append(row)
        return rows

    def _along_first_axis(self, name: str) -> Table:
        """A row for each method and its other coordinates, a column for each value of the first axis."""
        axis = next(iter(self.part.grid.axes))
        columns = self._places(axis, name)
        best = best_points(self.shown, name, self.metrics[name])
        rows: dict[str, dict[Coordinate | None, Cell]] = {}
        for one in self.shown:
            cells = rows.setdefault(_label(one, axis), {})
            cell = _cell(one, name, best=best.get(one.method) == one)
            own = one.at(axis)
            cells |= dict.fromkeys(columns, cell) if own is None else {own: cell}
        for reference in self._references(axis, name):
            for method, values in reference.values.items():
                published = zip(reference.at, values, strict=True)
                rows[f"{method}: {reference.source}"] = {at: Value(value) for at, value in published}
        body = tuple((label, *(cells.get(column, "") for column in columns)) for label, cells in rows.items())
        note = f"{self._better(name)}; each method's best is marked. {self._seeds()}"
        return Table(f"{name} by {short(axis)}", ("", *map(as_text, columns)), body, note)

    def _along_steps(self, name: str) -> Table:
        """A row for each method and its coordinates, a column for each checkpoint."""
        rows: dict[str, list[Cell]] = {}
        for one in self.summaries:
            rows.setdefault(_label(one), []).append(_cell(one, name))
        steps = dict.fromkeys(one.step for one in self.summaries)
        columns = ("", *(f"step {step or self.last or 'last'}" for step in steps))
        body = tuple((label, *cells) for label, cells in rows.items())
        return Table(f"{name} by steps", columns, body, f"{self._better(name)}. {self._seeds()}")

    def _plot_axis(self, panel: Axes, axis: str, name: str) -> None:
        place = _scale(panel, self._places(axis, name))
        lines: dict[str, list[Summary]] = {}
        for one in self.shown:
            if one.at(axis) is not None:
                lines.setdefault(_label(one, axis), []).append(one)
        for label, points in lines.items():
            method = points[0].method
            turn = [key for key, others in lines.items() if others[0].method == method].index(label)
            style = {**self._styles[method], "linestyle": DASHES[turn % len(DASHES)]}
            scored = sorted((one for one in points if one.scored), key=lambda one: place(one.at(axis)))
            _plot_spreads(panel, [(place(one.at(axis)), one) for one in scored], name, label=label, **style)
            lost = [place(one.at(axis)) for one in points if one.diverged]
            panel.plot(lost, [0.02] * len(lost), "x", color=style["color"], transform=panel.get_xaxis_transform())
        for reference in self._references(axis, name):
            for method, numbers in reference.values.items():
                where = [place(value) for value in reference.at]
                style = self._styles.get(method) or line_style(method)
                faint = {"alpha": 0.45, "linestyle": (0, (1, 1.5)), "markerfacecolor": "white", "linewidth": 1.2}
                panel.plot(where, numbers, label=f"{method}, {reference.source}", **{**style, **faint})
        panel.set_title(f"{name}, {self._better(name)}")
        panel.set_xlabel(short(axis).replace("_", " "))
        if any(one.diverged for one in self.summaries):
            panel.plot([], [], "x", color=FAINT, label="diverged")

    def _plot_steps(self, panel: Axes, method: str, name: str, last: int) -> None:
        import matplotlib

        points = list(dict.fromkeys(one.point for one in self.summaries if one.method == method))
        colours = matplotlib.colormaps["viridis"].resampled(max(len(points), 2) + 1)
        for number, point in enumerate(points):
            found = [one for one in self.summaries if (one.method, one.point) == (method, point) and one.scored]
            label = ", ".join(f"{short(axis).replace('_', ' ')} {as_text(value)}" for axis, value in point) or method
            steps = sorted(((one.step or last, one) for one in found), key=lambda pair: pair[0])
            _plot_spreads(panel, steps, name, label=label, color=colours(number), marker="o", markersize=3.5)
        panel.set_title(f"{method}: {name}, {self._better(name)}")
        panel.set_xlabel("step")
        panel.legend()

    @cached_property
    def _styles(self) -> dict[str, dict[str, Any]]:
        """The line style of each method: that of its title in every plot, or its own if a title has two methods."""
        plan = Plan(self.config.benchmark())
        title_of = {unit.method: plan.training(unit).adapter.title for unit in plan.units() if unit.task == self.task}
        styles, taken = {}, set()
        for cell in self.part.cells():
            if cell.method not in styles:
                title = title_of[cell.name]
                styles[cell.method] = line_style(cell.method if title in taken else title)
                taken.add(title)
        return styles

    def _references(self, axis: str, name: str) -> list[Reference]:
        return [one for one in self.part.grid.references if (one.axis, one.metric) == (axis, name)]

    def _coordinates(self, axis: str) -> list[Coordinate]:
        return list(dict.fromkeys(value for one in self.summaries if (value := one.at(axis)) is not None))

    def _places(self, axis: str, name: str) -> list[Coordinate]:
        """All values along an axis, those of references too."""
        published = (value for one in self._references(axis, name) for value in one.at)
        return _ordered([*self._coordinates(axis), *published])

    def _better(self, name: str) -> str:
        return "higher is better" if self.metrics[name] else "lower is better"

    def _seeds(self) -> str:
        seeds = self.part.grid.seeds
        if len(seeds) == 1:
            return f"One seed, {seeds[0]}."
        return f"Mean over {len(seeds)} seeds ({', '.join(map(str, seeds))}), and their range."


def _plot_spreads(panel: Axes, points: Sequence[tuple[Any, Summary]], name: str, **style: Any) -> None:
    """A line of means over places, and the range of the seeds as a band."""
    places = [place for place, _ in points]
    spreads = [one.values[name] for _, one in points]
    panel.plot(places, [spread.mean for spread in spreads], **style)
    if any(one.scored > 1 for _, one in points):
        low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
        panel.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _scale(panel: Axes, values: Sequence[Coordinate]) -> Callable[[Any], float]:
    """Set up the x axis for these values. Returns the function from a value to its place."""
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        panel.set_xticks(range(len(values)), [as_text(value) for value in values])
        panel.set_xlim(-0.4, len(values) - 0.6)
        return list(values).index
    if min(numbers) > 0 and max(numbers) >= LOGARITHMIC * min(numbers):
        panel.set_xscale("log")
    elif min(numbers) > 0 and all(math.log2(number).is_integer() for number in numbers):
        panel.set_xscale("log", base=2)
    if len(numbers) <= 4:
        panel.set_xticks(numbers, [as_text(value) for value in values])
        panel.minorticks_off()
    return float


def _plot_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]


def _cell(one: Summary, name: str, best: bool = False) -> Cell:
    if not one.scored:
        return DIVERGED if one.diverged else WAITING
    spread = one.values[name]
    if one.scored == 1:
        return Value(spread.mean, best=best)
    return Value(spread.mean, spread.low, spread.high, best=best)


def _label(one: Summary, axis: str | None = None) -> str:
    """The method, and its coordinates on all axes but one."""
    return ", ".join([one.method, *(f"{short(name)} {as_text(value)}" for name, value in one.point if name != axis)])


def _published(reference: Reference, one: Summary) -> float | None:
    at = one.at(reference.axis)
    values = dict(zip(reference.at, reference.values.get(one.method, ()), strict=False))
    return None if at is None else values.get(at)


def _ordered(values: Iterable[Coordinate]) -> list[Coordinate]:
    """Each once: numbers by size, words in the order given."""
    once = list(dict.fromkeys(values))
    return once if any(isinstance(value, str) for value in once) else sorted(once)


def _size(rows: int, columns: int) -> tuple[float, float]:
    return max(4.2 * columns, 5.0), 3.6 * rows

"""What an analysis leaves behind: a table (CSV), plots (PNG and SVG), and the command that made them."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision tell apart: one colour a method, in every plot.
COLOURS = {
    "OFT": "#0072b2",
    "COFT": "#56b4e9",
    "Naive": "#d55e00",
    "ETHER": "#009e73",
    "ETHER+": "#cc3d8e",
    "LoRA": "#8a6d00",
}
MARKERS = {"OFT": "s", "COFT": "D", "Naive": "^", "ETHER": "o", "ETHER+": "P", "LoRA": "v"}
INK, FAINT, GRID = "#222222", "#777777", "#dddddd"

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a plot looks alike everywhere
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ether_diffusion",  # equal plots give equal files
}


def command_line(script: str, arguments: Sequence[str]) -> str:
    """A command as typed: what makes the same table and plots again."""
    return shlex.join(["python", script, *arguments])


def write_command(folder: Path, command: str) -> Path:
    """Write `command.txt`."""
    path = folder / "command.txt"
    write_whole(path, command + "\n")
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as CSV, whole or not at all; the columns are those of the first row. Numbers keep ten digits.

    A number that is unknown (nan, None) is an empty cell.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_whole(path, text.getvalue())
    return path


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return value


@contextmanager
def plot(
    path: Path,
    command: str,
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (6.4, 4.2),
    **subplots: Any,
) -> Iterator[list[Axes]]:
    """Axes to draw on, row by row; saved as `path`.png and `path`.svg, whole or not at all, when the block ends.

    Args:
        path: Without a suffix.
        command: Goes into both files' metadata.
        size: Of the whole figure, in inches.
        subplots: As for `Figure.subplots`.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType] - its keys are strings
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
        save_figure(figure, path, command)


def save_figure(figure: Figure, path: Path, command: str) -> None:
    """Save as PNG and SVG with the command in their metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"Description": command}
    for kind, metadata in (("png", described), ("svg", {**described, "Date": None})):
        partial = path.with_name(f".{path.name}.{kind}.partial")
        figure.savefig(partial, format=kind, dpi=160, metadata=metadata)
        partial.replace(path.with_name(f"{path.name}.{kind}"))


def check_matplotlib() -> None:
    """Say in one line that matplotlib is missing; to be called before hours of work.

    Raises:
        UserError: it is.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("Plots need matplotlib: pip install matplotlib.") from error


def line_style(title: str) -> dict[str, Any]:
    """Colour and marker of a method in every plot, by its title."""
    spare = ("#e69f00", "#444444", "#7f4fc9", "#8c564b", "#17a2b8")
    colour = COLOURS.get(title) or spare[sum(title.encode()) % len(spare)]
    return {"color": colour, "marker": MARKERS.get(title, "X")}

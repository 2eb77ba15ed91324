"""The files of an analysis: tables (CSV), plots (PNG and SVG), and the command that made them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.errors import UserError
from ether_diffusion.own_files import check_own, own_file, write_own

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette for every colour vision. A method has the same colour in every plot.
COLOURS = {
    "OFT": "#0072b2",
    "COFT": "#56b4e9",
    "Naive": "#d55e00",
    "ETHER": "#009e73",
    "ETHER+": "#cc3d8e",
    "LoRA": "#8a6d00",
}
MARKERS = {"OFT": "s", "COFT": "D", "Naive": "^", "ETHER": "o", "ETHER+": "P", "LoRA": "v"}
COMMAND = "command.txt"
INK, FAINT, GRID = "#222222", "#777777", "#dddddd"

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib: plots look the same everywhere
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


def check_outputs(folder: Path, *files: str, plots: Sequence[str] = ()) -> None:
    """Check, before long work, that an analysis can be written into a folder.

    Args:
        files: Names of its files besides `command.txt`.
        plots: Names of its plots, without a suffix.

    Raises:
        UserError: matplotlib is missing; or there is a file of one of these names that is not ours.
    """
    check_matplotlib()
    pictures = [f"{name}.{kind}" for name in plots for kind in ("png", "svg")]
    check_own(*(folder / name for name in (COMMAND, *files, *pictures)))


def write_command(folder: Path, command: str) -> None:
    """Write `command.txt`."""
    write_own(folder / COMMAND, command + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as CSV, whole or not at all. The first row gives the columns; numbers keep ten digits.

    An unknown number (nan, None) is an empty cell.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_own(path, text.getvalue())
    return path


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return csv_text(value) if isinstance(value, str) else value


def csv_text(text: str) -> str:
    """Text for a cell of a CSV file: after an apostrophe where a spreadsheet would take it for a formula."""
    text = text.replace("\r", "\n")  # which csv quotes
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


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
    """Axes to plot on, row by row. When the block ends, they are saved as `path`.png and `path`.svg.

    Args:
        command: How the plot was made; both files' metadata have it.
        size: Width and height of the figure in inches.
        subplots: As for `Figure.subplots`.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
        for kind, dated in (("png", {}), ("svg", {"Date": None})):  # no date: equal plots are equal files
            with own_file(path.with_name(f"{path.name}.{kind}")) as partial:
                figure.savefig(partial, format=kind, dpi=160, metadata={"Description": command, **dated})


def check_matplotlib() -> None:
    """Raise UserError before long work if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("Plots need matplotlib: pip install matplotlib.") from error


def line_style(title: str) -> dict[str, Any]:
    """The colour and marker of a method in every plot, by its title."""
    spare = ("#e69f00", "#444444", "#7f4fc9", "#8c564b", "#17a2b8")
    colour = COLOURS.get(title) or spare[sum(title.encode()) % len(spare)]
    return {"color": colour, "marker": MARKERS.get(title, "X")}

"""Tables of numbers with intervals, written as HTML, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .markup import Markup, element

ABSENT = "-"


@dataclass(frozen=True)
class Value:
    """A number and the interval that it lies in, if one is known. Without number: not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    """The best of its column."""

    def number(self) -> str:
        return _number(self.value)

    def interval(self) -> str:
        """`[0.651, 0.680]`, or an empty string."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        return f"[{_number(self.low)}, {_number(self.high)}]"


Cell = str | Value


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """What a reader must know to compare the rows; may be empty."""
    keys: tuple[str, ...] = ()
    """Names of the columns for programs; default: the headings."""
    folded: bool = False
    """Detail: a page shows it when it is asked for."""


def mark_best(table: Table, higher_is_better: dict[str, bool], among: int) -> Table:
    """Mark the best value of each column that is named, in its first `among` rows, where these differ.

    Where several are the best, all are marked. Rows beyond, such as a ceiling, take no part.
    """
    rows = [list(row) for row in table.rows]
    for place, column in enumerate(table.columns):
        cells = [(row, cell) for row in rows[:among] if isinstance(cell := row[place], Value)]
        known = [cell.value for _, cell in cells if cell.value is not None]
        if column not in higher_is_better or len(set(known)) < 2:
            continue
        best = max(known) if higher_is_better[column] else min(known)
        for row, cell in cells:
            row[place] = replace(cell, best=cell.value == best)
    return replace(table, rows=tuple(tuple(row) for row in rows))


def to_html(table: Table) -> Markup:
    """A `<table>`; its title and note are the page's to show."""
    head = element("tr", *(element("th", column, scope="col") for column in table.columns))
    body = [element("tr", element("th", _plain(row[0]), scope="row"), *map(_html_cell, row[1:])) for row in table.rows]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def to_markdown(tables: Sequence[Table]) -> str:
    """Headings, notes and pipe tables; what is best is bold."""
    parts = []
    for table in tables:
        align = ["---"] + ["---:" if _is_numeric(table, place) else "---" for place in range(1, len(table.columns))]
        lines = [[_markdown(column) for column in table.columns], align]
        lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
        grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join(filter(None, [f"## {_markdown(table.title)}", _markdown(table.note), grid])))
    return "\n\n".join(parts) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    """`table` environments for a document with `\\usepackage{booktabs}`; what is best is bold."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        columns = "".join("r" if place and _is_numeric(table, place) else "l" for place in range(len(table.columns)))
        caption = ". ".join(filter(None, [table.title.rstrip("."), table.note]))
        lines = [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_latex(caption)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            " & ".join(_latex(column) for column in table.columns) + " \\\\",
            "\\midrule",
            *(" & ".join(map(_latex_cell, row)) + " \\\\" for row in table.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """A line a number, in full: table, row, column, value, low, high. Cells of text are left out."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.keys or table.columns, row, strict=True):
                if isinstance(cell, Value) and cell.value is not None:
                    bounds = ["" if bound is None else repr(bound) for bound in (cell.low, cell.high)]
                    writer.writerow([table.title, _plain(row[0]), column, repr(cell.value), *bounds])
    return file.getvalue()


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else f"{value:,.1f}"  # no -0.000


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else " ".join(filter(None, [cell.number(), cell.interval()]))


def _is_numeric(table: Table, place: int) -> bool:
    return any(isinstance(row[place], Value) for row in table.rows)


def _html_cell(cell: Cell) -> Markup:
    if isinstance(cell, str):
        return element("td", cell)
    number = element("strong", cell.number()) if cell.best else cell.number()
    interval = element("span", " ", cell.interval(), class_="interval") if cell.interval() else None
    return element("td", number, interval, class_="number")


def _markdown(words: str) -> str:
    """As text: no line breaks, no tags, and no sign with a meaning of its own."""
    return re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(words.split()))


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _markdown(cell)
    number = f"**{cell.number()}**" if cell.best else cell.number()
    return " ".join(filter(None, [number, cell.interval()]))


_LATEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "%": "\\%", "#": "\\#", "_": "\\_",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", '"': "''", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "·": "$\\cdot$",
}  # fmt: skip


def _latex(words: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(words.split()))


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        # A bracket after \\ would be read as an argument of it.
        return "{}" * cell.startswith("[") + _latex(cell)
    number = f"\\textbf{{{cell.number()}}}" if cell.best else _latex(cell.number())
    interval = f"{{\\scriptsize {cell.interval()}}}" if cell.interval() else ""
    return " ".join(filter(None, [number, interval]))

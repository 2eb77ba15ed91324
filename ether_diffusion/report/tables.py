"""Tables of numbers with intervals, for a terminal, as Markdown, LaTeX or CSV; `parts.html` writes them as HTML."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ether_diffusion.analysis.output import csv_text
from ether_diffusion.evaluation.results import aligned

ABSENT = "-"


@dataclass(frozen=True)
class Value:
    """A number with its interval, if there is one. None: not measured."""

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
    """Rows under headings; the first cell of a row is its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """What a reader must know to compare the rows; may be empty."""
    keys: tuple[str, ...] = ()
    """Names of the columns for programs; default: the headings."""
    folded: bool = False
    """A page shows it when the reader opens it."""


def mark_best(table: Table, higher_is_better: dict[str, bool], among: int) -> Table:
    """Mark the best values of the named columns among the first `among` rows.

    Equal best values are all marked; a column whose values are all equal has none. Later rows, such as ceilings, are
    never marked.
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


def to_markdown(tables: Sequence[Table]) -> str:
    """Headings, notes and pipe tables; the best values are bold."""
    parts = []
    for table in tables:
        align = ["---", *("---:" if numeric else "---" for numeric in _numeric_columns(table)[1:])]
        head, *body = ([_markdown_cell(cell) for cell in row] for row in (table.columns, *table.rows))
        grid = "\n".join("| " + " | ".join(line) + " |" for line in (head, align, *body))
        parts.append("\n\n".join(filter(None, [f"## {markdown_text(table.title)}", markdown_text(table.note), grid])))
    return "\n\n".join(parts) + "\n"


def markdown_code(text: str) -> str:
    """Text as a block of code in Markdown, whatever it holds."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}bash\n{text}\n{fence}"


def to_text(tables: Sequence[Table]) -> str:
    """Tables for a terminal: headings, notes and aligned columns; a star marks the best values."""
    parts = []
    for table in tables:
        rows = [[cell if isinstance(cell, str) else _plain_value(cell) for cell in row] for row in table.rows]
        parts.append("\n".join(filter(None, [table.title, aligned([table.columns, *rows]), table.note])))
    return "\n\n".join(parts)


def to_latex(tables: Sequence[Table]) -> str:
    """`table` environments for a document with `\\usepackage{booktabs}`; the best values are bold."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" + "".join("r" if numeric else "l" for numeric in _numeric_columns(table)[1:])
        caption = ". ".join(filter(None, [table.title.rstrip("."), table.note]))
        head, *body = (" & ".join(map(_latex_cell, row)) + " \\\\" for row in (table.columns, *table.rows))
        lines = [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_latex(caption)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            head,
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """A line for each number, in full: table, row, column, value, low, high. Cells of text are left out."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.keys or table.columns, row, strict=True):
                if isinstance(cell, Value) and cell.value is not None:
                    bounds = ["" if bound is None else repr(bound) for bound in (cell.low, cell.high)]
                    names = [csv_text(str(name)) for name in (table.title, row[0], column)]
                    writer.writerow([*names, repr(cell.value), *bounds])
    return file.getvalue()


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else f"{value:,.1f}"  # + 0.0: no -0.000


def _plain_value(value: Value) -> str:
    return " ".join(filter(None, ["*" * value.best + value.number(), value.interval()]))


def _numeric_columns(table: Table) -> list[bool]:
    return [any(isinstance(row[place], Value) for row in table.rows) for place in range(len(table.columns))]


def markdown_text(text: str) -> str:
    """Plain text in Markdown: no line breaks, no tags, no sign with a meaning of its own; `_` has none in a word."""
    return re.sub(r"([\\`*|<>\[\]#~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return markdown_text(cell)
    number = f"**{cell.number()}**" if cell.best else cell.number()
    return " ".join(filter(None, [number, cell.interval()]))


_LATEX = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "%": "\\%", "#": "\\#", "_": "\\_",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", '"': "''", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "·": "$\\cdot$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        # LaTeX would read a bracket after \\ as an argument of it.
        return "{}" * cell.startswith("[") + _latex(cell)
    number = f"\\textbf{{{cell.number()}}}" if cell.best else _latex(cell.number())
    interval = f"{{\\scriptsize {cell.interval()}}}" if cell.interval() else ""
    return " ".join(filter(None, [number, interval]))

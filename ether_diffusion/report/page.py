"""A report of one or several runs: one HTML file that needs nothing but itself, or their tables for other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ether_diffusion.errors import UserError
from ether_diffusion.own_files import check_own, write_own
from ether_diffusion.version import __version__

from .curves import Chart, Series, chart
from .images import image_grids, sample_sheets
from .reported_run import ReportedRun, flattened, read_runs
from .score_tables import score_tables
from .tables import Table, to_csv, to_latex, to_markdown

TABLES: dict[str, Callable[[Sequence[Table]], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}
PAGES = (".html", ".htm")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def write_report(runs: Sequence[str | Path], outputs: Sequence[str | Path]) -> list[Path]:
    """Write a report of runs side by side. The same runs give the same files.

    Args:
        runs: Run folders, folders of results, or single files of results.
        outputs: `.html`: everything; `.csv`, `.md`, `.tex`: only the tables of scores.

    Raises:
        UserError: a run cannot be read, an output has another suffix, or there are no scores to make tables of.
            Nothing is written.
    """
    files = [Path(output).expanduser() for output in outputs]
    for file in files:
        if file.suffix.lower() not in (*PAGES, *TABLES):
            raise UserError(f"report: --output {file}: expected a name that ends in .html, {', '.join(TABLES)}.")
    check_own(*files)
    read = read_runs(runs)
    tables = score_tables(read)
    if not tables and any(file.suffix.lower() in TABLES for file in files):
        raise UserError(f"report: no scores in {', '.join(str(run.path) for run in read)}; evaluate the runs first.")
    for file in files:
        suffix = file.suffix.lower()
        text = TABLES[suffix](tables) if suffix in TABLES else page(read, tables)
        write_own(file, text.encode(errors="replace"))  # half a surrogate pair cannot be encoded
    return files


def page(runs: Sequence[ReportedRun], tables: Sequence[Table]) -> str:
    """The HTML file. Its content security policy forbids scripts and everything from outside the file."""
    grids, grid_count = image_grids(runs)
    return _TEMPLATES.get_template("page.html").render(
        title=f"ether_diffusion: {', '.join(run.label for run in runs)}",
        version=__version__,
        summary=_summary(runs),
        notes=[note for run in runs for note in run.notes],
        scores=tables,
        charts=_losses(runs),
        grids=grids,
        grid_count=grid_count,
        sheets=[sheets for run in runs if (sheets := sample_sheets(run))],
        settings=_settings(runs),
    )


def _printable(value: object) -> object:
    """Text, with the replacement character for what no HTML file can hold. Markup has passed through here before."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _UNPRINTABLE.sub("\ufffd", value)
    return value


_TEMPLATES = Environment(
    loader=PackageLoader("ether_diffusion.report"),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def _summary(runs: Sequence[ReportedRun]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    rows = tuple((run.label, str(run.path), *(run.facts.get(name, "") for name in names)) for run in runs)
    return Table("Runs", ("run", "folder", *names), rows)


def _losses(runs: Sequence[ReportedRun]) -> list[Chart]:
    """One chart of the losses of all runs, and a chart of each run whose loss has parts."""
    total = [Series(run.label, one.steps, one.values) for run in runs for one in run.losses if one.name == "loss"]
    name = "loss, mean over the trainings" if any("trainings" in run.facts for run in runs) else "loss"
    together = [(name, total)] if len(total) > 1 else []
    each = [(f"{run.label}: loss and its parts", run.losses) for run in runs if len(run.losses) > 1]
    alone = [(f"{run.label}: loss", run.losses) for run in runs if len(run.losses) == len(total) == 1]
    charts = [chart(title, series) for title, series in (*together, *each, *alone)]
    return [one for one in charts if one is not None]


def _settings(runs: Sequence[ReportedRun]) -> list[Table]:
    """The settings in which several runs differ, and then all settings of each run, folded."""
    configs = {run.label: flattened(run.config) for run in runs if run.config}
    tables = [
        Table(f"All settings: {label}", ("setting", "value"), tuple(settings.items()), folded=True)
        for label, settings in configs.items()
    ]
    keys = dict.fromkeys(key for settings in configs.values() for key in settings)
    rows = [(key, *(settings.get(key, "") for settings in configs.values())) for key in keys]
    different = tuple(row for row in rows if len(set(row[1:])) > 1)
    return [Table("Where they differ", ("setting", *configs), different)] * bool(different) + tables

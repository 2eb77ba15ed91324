"""A report of one or several runs: one HTML file that needs nothing but itself, or their tables for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.version import __version__

from .curves import Series, chart
from .images import image_grids, sample_sheets
from .markup import Markup, element, joined
from .reported_run import ReportedRun, flattened, read_runs
from .score_tables import score_tables
from .tables import Table, to_csv, to_html, to_latex, to_markdown

TABLES: dict[str, Callable[[Sequence[Table]], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}
PAGES = (".html", ".htm")


def write_report(runs: Sequence[str | Path], outputs: Sequence[str | Path]) -> list[Path]:
    """Write what runs have in common and where they differ. The same runs give the same files.

    Args:
        runs: Run folders, folders of results, or single files of results.
        outputs: `.html`: everything; `.csv`, `.md`, `.tex`: the tables of scores alone.

    Raises:
        UserError: a run that cannot be read, another suffix, or no scores to make tables of. Nothing is written.
    """
    files = [Path(output).expanduser() for output in outputs]
    for file in files:
        if file.suffix.lower() not in (*PAGES, *TABLES):
            raise UserError(f"report: --output {file}: expected a name that ends in .html, {', '.join(TABLES)}.")
        if file.is_dir():
            raise UserError(f"report: --output {file} is a folder; expected a file.")
    read = read_runs(runs)
    tables = score_tables(read)
    if not tables and any(file.suffix.lower() in TABLES for file in files):
        raise UserError(f"report: no scores in {', '.join(str(run.path) for run in read)}; evaluate the runs first.")
    for file in files:
        suffix = file.suffix.lower()
        _write(file, TABLES[suffix](tables) if suffix in TABLES else page(read, tables))
    return files


def page(runs: Sequence[ReportedRun], tables: Sequence[Table]) -> str:
    """The HTML file. A policy in it forbids scripts and whatever would be fetched from elsewhere."""
    title = f"ether_diffusion: {', '.join(run.label for run in runs)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    sections = [
        ("Runs", [to_html(_summary(runs)), *_notes(runs)]),
        ("Scores", [_scored(table) for table in tables]),
        ("Losses", _losses(runs)),
        ("Images", [*image_grids(runs), *map(sample_sheets, runs)]),
        ("Settings", _settings(runs)),
    ]
    body = element(
        "body",
        element("h1", title),
        *(_section(name, parts) for name, parts in sections),
        element("footer", f"Written by ether_diffusion {__version__}. No scripts, nothing from elsewhere."),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _write(file: Path, words: str) -> None:
    write_whole(file, words.encode(errors="replace").decode())  # half a surrogate pair is no text


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _section(name: str, parts: Sequence[Markup | None]) -> Markup | None:
    present = [part for part in parts if part]
    return element("section", element("h2", name), *present) if present else None


def _summary(runs: Sequence[ReportedRun]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    rows = tuple((run.label, str(run.path), *(run.facts.get(name, "") for name in names)) for run in runs)
    return Table("Runs", ("run", "folder", *names), rows)


def _notes(runs: Sequence[ReportedRun]) -> list[Markup]:
    return [element("p", note, class_="fault") for run in runs for note in run.notes]


def _scored(table: Table) -> Markup:
    note = element("p", table.note, class_="note") if table.note else None
    if table.folded:
        return element("details", element("summary", table.title), note, to_html(table))
    return joined(element("h3", table.title), note, to_html(table))


def _losses(runs: Sequence[ReportedRun]) -> list[Markup | None]:
    """The loss of all runs in one chart, and where a run's loss has parts, a chart of these."""
    total = [Series(run.label, one.steps, one.values) for run in runs for one in run.losses if one.name == "loss"]
    name = "loss, mean over the trainings" if any("trainings" in run.facts for run in runs) else "loss"
    together = [(name, total)] if len(total) > 1 else []
    each = [(f"{run.label}: loss and its parts", run.losses) for run in runs if len(run.losses) > 1]
    alone = [(f"{run.label}: loss", run.losses) for run in runs if len(run.losses) == len(total) == 1]
    return [chart(title, series) for title, series in (*together, *each, *alone)]


def _settings(runs: Sequence[ReportedRun]) -> list[Markup | None]:
    """Where several runs differ, in sight; each run's own, folded."""
    told = [(run, flattened(run.config)) for run in runs if run.config]
    parts: list[Markup | None] = []
    if len(told) > 1:
        keys = list(dict.fromkeys(key for _, settings in told for key in settings))
        rows = [(key, *(settings.get(key, "") for _, settings in told)) for key in keys]
        different = tuple(row for row in rows if len(set(row[1:])) > 1)
        table = Table("Where they differ", ("setting", *(run.label for run, _ in told)), different)
        parts.append(_scored(table) if different else None)
    for run, settings in told:
        table = Table(f"All settings: {run.label}", ("setting", "value"), tuple(settings.items()), folded=True)
        parts.append(_scored(table))
    return parts


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
thead th { border-bottom: 1px solid #999; }
tbody th { font-weight: normal; min-width: 7rem; max-width: 22rem; overflow-wrap: anywhere; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.interval, .note, figcaption, footer { color: #666; font-size: .85em; }
.scroll { overflow-x: auto; }
.images td { white-space: nowrap; }
.images img, .sheets img { margin: 0 3px 3px 0; height: auto; vertical-align: top; }
.images img { width: 128px; }
.sheets img { max-width: 100%; }
.pixels { image-rendering: pixelated; }
.fault { color: #b00020; }
figure { margin: 1rem 0; }
figure > svg { max-width: 100%; display: block; }
svg path { stroke-linecap: round; stroke-linejoin: round; }
.legend span { margin-left: 1.2em; white-space: nowrap; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
footer { margin: 3rem 0 1rem; }
"""

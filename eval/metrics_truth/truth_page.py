"""The results as a Markdown table and as a plot: a row for each metric, a column for each fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.analysis.output import plot

from .faults import FAULTS

Rows = Sequence[Mapping[str, Any]]


def table(rows: Rows) -> str:
    """One table for each source of images; a tau in brackets where the metric does not see the fault."""
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        found = {(row["metric"], row["fault"]): row for row in rows if row["source"] == source}
        faults = [name for name in FAULTS if any(fault == name for _, fault in found)]
        lines = [f"| {source} images | {' | '.join(FAULTS[name].title for name in faults)} |"]
        lines.append("|---" * (len(faults) + 1) + "|")
        for metric in dict.fromkeys(metric for metric, _ in found):
            cells = [_cell(found.get((metric, fault))) for fault in faults]
            lines.append(f"| {metric} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def plot_table(path: Path, rows: Rows, command: str) -> None:
    """A coloured table of the taus: blue where a metric follows a fault, red where it is misled."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    height = 0.9 + 0.27 * max(len({row["metric"] for row in rows if row["source"] == s}) for s in sources)
    with plot(path, command, rows=len(sources), size=(6.6, height * len(sources))) as axes:
        for axis, source in zip(axes, sources, strict=True):
            own = [row for row in rows if row["source"] == source]
            metrics = list(dict.fromkeys(row["metric"] for row in own))
            faults = [name for name in FAULTS if any(row["fault"] == name for row in own)]
            values = {(row["metric"], row["fault"]): row for row in own}
            grid = [[values[m, f]["tau"] if (m, f) in values else 0.0 for f in faults] for m in metrics]
            axis.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
            for y, metric in enumerate(metrics):
                for x, fault in enumerate(faults):
                    if (metric, fault) in values:
                        tau = values[metric, fault]["tau"]
                        ink = "white" if abs(tau) > 0.6 else "black"
                        axis.text(x, y, f"{tau:.2f}", ha="center", va="center", color=ink, fontsize=8)
            axis.set_xticks(range(len(faults)), [FAULTS[name].title.replace(" ", "\n") for name in faults])
            axis.set_yticks(range(len(metrics)), metrics)
            axis.grid(visible=False)
            axis.set_title(f"{source} images: Kendall's tau, by metric and fault")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    tau = f"{row['tau']:.2f}"
    return {"sees": f"**{tau}**", "misled": f"**{tau}** (misled)"}.get(row["verdict"], f"({tau})")

"""Distances of runs as tables and plots, and the command that made them (paper, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import plots
from .analysed_run import Bases, analysed_runs
from .changes import changes_of
from .geometry import distances, mean_distance
from .output import check_matplotlib, plot, write_command, write_table

SIDES = {"transform_in": r"input side, $\|T - I\|_F$", "transform_out": r"output side, $\|T - I\|_F$"}


def write_distances(runs: Sequence[Path], output: Path, command: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Measure runs; write `geometry.csv`, a row a run, `layers.csv`, a row a layer, and a plot of each.

    Args:
        runs: Run, checkpoint or PEFT folders.
        command: Goes into `command.txt` and the plots' metadata.
        device: Where the double precision is computed.

    Returns:
        The rows of `geometry.csv`.

    Raises:
        UserError: as `analysed_runs` and `changes_of`; or matplotlib is missing. Nothing is written then.
    """
    check_matplotlib()
    bases, means, layers = Bases(), [], []
    for run in analysed_runs(list(runs)):
        found = distances(changes_of(bases.unet(run), run.path, device))
        layers += [{**run.facts(), **asdict(row)} for row in found]
        means.append({**run.facts(), **asdict(mean_distance(found))})
    write_command(output, command)
    write_table(output / "geometry.csv", means)
    write_table(output / "layers.csv", layers)
    with plot(output / "geometry", command, columns=2, size=(10, 4.4)) as (transforms, weights):
        plots.transforms_by_rate(transforms, means)
        plots.weights_by_rate(weights, means)
    shown = {side: label for side, label in SIDES.items() if not all(math.isnan(row[side]) for row in layers)}
    shown["weight"] = r"$\|W' - W\|_F$"
    size = (9.5, 0.7 + 2.4 * len(shown))
    with plot(output / "layers", command, rows=len(shown), size=size, sharex=True) as axes:
        for one, (value, label) in zip(axes, shown.items(), strict=True):
            plots.layers(one, layers, value, label)
        axes[0].set_title("Distances of the transforms from the identity, of the weights from the base's")
        axes[-1].set_xlabel("adapted layer, in the order of the network")
        axes[0].figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper")
    return means

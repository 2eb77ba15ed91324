"""How far adapters have gone from the identity and from the base's weights, per layer and averaged (paper, Fig. 4).

python eval/geometry.py RUN…          # table, layers, plots and the command, in runs/geometry
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.analysis import plots  # noqa: E402
from ether_diffusion.analysis.analysed_run import Bases, analysed_runs  # noqa: E402
from ether_diffusion.analysis.changes import changes_of  # noqa: E402
from ether_diffusion.analysis.geometry import distances, mean_distance  # noqa: E402
from ether_diffusion.analysis.output import check_matplotlib, command_line, plot, write_command, write_table  # noqa: E402
from ether_diffusion.analysis.setups import labels  # noqa: E402
from ether_diffusion.errors import exit_code  # noqa: E402


def measure(paths: list[Path], output: Path, command: str, device: str) -> list[dict]:
    """Write everything; the rows of the table, one a run."""
    check_matplotlib()
    bases, means, layers = Bases(), [], []
    for run in analysed_runs(paths):
        found = distances(changes_of(bases.unet(run), run.path, device))
        layers += [{**run.facts(), **asdict(row)} for row in found]
        means.append({**run.facts(), **asdict(mean_distance(found))})
    write_command(output, command)
    write_table(output / "geometry.csv", means)
    write_table(output / "layers.csv", layers)
    with plot(output / "geometry", command, columns=2, size=(10, 4.4)) as (transforms, weights):
        plots.transforms_by_rate(transforms, means)
        plots.weights_by_rate(weights, means)
    sides = {"transform_in": r"input side, $\|T - I\|_F$", "transform_out": r"output side, $\|T - I\|_F$"}
    shown = {side: label for side, label in sides.items() if not all(math.isnan(row[side]) for row in layers)}
    shown["weight"] = r"$\|W' - W\|_F$"
    size = (9.5, 0.7 + 2.4 * len(shown))
    with plot(output / "layers", command, rows=len(shown), size=size, sharex=True) as axes:
        for one, (value, label) in zip(axes, shown.items(), strict=True):
            plots.layers(one, layers, value, label)
        axes[0].set_title("Distances of the transforms from the identity, of the weights from the base's")
        axes[-1].set_xlabel("adapted layer, in the order of the network")
        axes[0].figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper")
    return means


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run, checkpoint or PEFT folders")
    parser.add_argument("--output", type=Path, default=Path("runs/geometry"), metavar="DIR")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="for the double precision (default: cpu)")
    arguments = parser.parse_args()
    command = command_line("eval/geometry.py", sys.argv[1:])
    rows = measure(arguments.runs, arguments.output, command, arguments.device)
    names = labels(rows)
    width = max(map(len, names))
    for row, name in zip(rows, names, strict=True):
        print(f"{row['run']:<32} {name:<{width}} |T - I| {row['transform']:8.4g}   |W' - W| {row['weight']:8.4g}")
    print(f"Table and plots: {arguments.output}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/geometry.py", main))

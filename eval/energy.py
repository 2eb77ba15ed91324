"""How the hyperspherical energy changes while an adapter is trained, over a run's checkpoints (paper, Fig. 7).

python eval/energy.py RUN…            # table, layers, plot and the command, in runs/energy
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.analysis import plots  # noqa: E402
from ether_diffusion.analysis.analysed_run import Bases, analysed_runs  # noqa: E402
from ether_diffusion.analysis.changes import changes_of  # noqa: E402
from ether_diffusion.analysis.energy import CHUNK, BaseEnergies, LayerEnergy, pairs  # noqa: E402
from ether_diffusion.analysis.output import check_matplotlib, command_line, plot, write_command, write_table  # noqa: E402
from ether_diffusion.analysis.starts import changes_at_start  # noqa: E402
from ether_diffusion.errors import UserError, exit_code  # noqa: E402
from ether_diffusion.evaluation.choice import checkpoints_of  # noqa: E402
from ether_diffusion.progress import progress_bar  # noqa: E402


def stages_of(run: Path) -> Iterator[tuple[int, Path]]:
    """The steps whose weights a run kept."""
    for name, folder in checkpoints_of(run).items():
        yield int(name.removeprefix("step-")), folder


def measure(paths: list[Path], output: Path, command: str, chunk: int, device: str) -> list[dict]:
    """Write everything; the rows of the table, one a run and step."""
    check_matplotlib()
    bases, known, table, layers = Bases(), {}, [], []
    for run in analysed_runs(paths):
        energies = known.setdefault((run.base_model, run.revision), BaseEnergies(chunk))
        facts = {"run": run.name, "method": run.title, "learning_rate": run.rate}
        stages = list(stages_of(run.path))
        with progress_bar(len(stages), run.name, "checkpoint") as bar:
            for step, folder in stages:
                found = list(energies.changes(changes_of(bases.unet(run), folder, device)))
                if step == stages[0][0] and step > 0:
                    try:
                        start = list(energies.changes(changes_at_start(bases.unet(run), folder, device)))
                    except UserError as error:
                        print(f"Note: {run.name}: no row for step 0: {error}", file=sys.stderr)
                    else:
                        # Of what was not changed at the start, the energy is the base's, which `found` has.
                        changes = {name: math.fsum(getattr(row, name) for row in start) for name in _CHANGES}
                        table.append({**facts, "step": 0, **_sums(found), **changes})
                        layers += [{**facts, "step": 0, **_of_layer(row)} for row in start]
                table.append({**facts, "step": step, **_sums(found)})
                layers += [{**facts, "step": step, **_of_layer(row)} for row in found]
                bar.update()
    write_command(output, command)
    write_table(output / "energy.csv", table)
    write_table(output / "layers.csv", layers)
    with plot(output / "energy", command) as (axes,):
        plots.energy(axes, table)
    return table


_CHANGES = ("change", "mean_change")
_COLUMNS = ("energy", "change", "mean", "mean_change")


def _sums(rows: list[LayerEnergy]) -> dict[str, float]:
    return {name: math.fsum(getattr(row, name) for row in rows) for name in _COLUMNS}


def _of_layer(row: LayerEnergy) -> dict[str, object]:
    return {"layer": row.layer, "pairs": pairs(row.out_features), "energy": row.energy, "change": row.change}


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/energy"), metavar="DIR")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help=f"rows at a time (default: {CHUNK})")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="for the double precision (default: cpu)")
    arguments = parser.parse_args()
    command = command_line("eval/energy.py", sys.argv[1:])
    rows = measure(arguments.runs, arguments.output, command, arguments.chunk, arguments.device)
    for row in rows:
        print(f"{row['run']:<32} {row['method']:<8} step {row['step']:<6} change {row['mean_change']:+.3e}")
    print(f"Table and plot: {arguments.output}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/energy.py", main))

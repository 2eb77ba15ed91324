"""The hyperspherical energy over runs' checkpoints as tables and a plot, and the command that made them (Fig. 7)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.errors import UserError
from ether_diffusion.files import step_of
from ether_diffusion.generation import checkpoints_of
from ether_diffusion.progress import progress_bar

from . import plots
from .analysed_run import Bases, analysed_runs
from .changes import changes_of
from .energy import CHUNK, BaseEnergies, LayerEnergy, pairs
from .output import check_matplotlib, plot, write_command, write_table
from .starts import changes_at_start

_CHANGES = ("change", "mean_change")
_COLUMNS = ("energy", "change", "mean", "mean_change")


def write_energies(
    runs: Sequence[Path], output: Path, command: str, chunk: int = CHUNK, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Measure runs; write `energy.csv`, a row a checkpoint, `layers.csv`, a row a layer of each, and a plot.

    Step 0 is measured where a training did not start at the base; if its start is no longer known, a note says so.

    Args:
        runs: Run folders with checkpoints.
        command: Goes into `command.txt` and the plot's metadata.
        chunk: Rows at a time, as for `hyperspherical_energy`.
        device: Where the double precision is computed.

    Returns:
        The rows of `energy.csv`.

    Raises:
        UserError: as `analysed_runs`, `checkpoints_of` and `changes_of`; or matplotlib is missing. Nothing is written
            then.
    """
    check_matplotlib()
    bases, known, table, layers = Bases(), {}, [], []
    for run in analysed_runs(list(runs)):
        energies = known.setdefault((run.base_model, run.revision), BaseEnergies(chunk))
        facts = {"run": run.name, "method": run.title, "learning_rate": run.rate}
        checkpoints = {step_of(folder) or 0: folder for folder in checkpoints_of(run.path).values()}
        first = min(checkpoints)
        with progress_bar(len(checkpoints), run.name, "checkpoint") as bar:
            for step, folder in checkpoints.items():
                found = list(energies.changes(changes_of(bases.unet(run), folder, device)))
                if step == first > 0:
                    try:
                        start = list(energies.changes(changes_at_start(bases.unet(run), folder, device)))
                    except UserError as error:
                        print(f"Note: {run.name}: no row for step 0: {error}", file=sys.stderr)
                    else:
                        # A layer that was not changed at the start has the base's energy, which `found` has.
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


def _sums(rows: Sequence[LayerEnergy]) -> dict[str, float]:
    return {name: math.fsum(getattr(row, name) for row in rows) for name in _COLUMNS}


def _of_layer(row: LayerEnergy) -> dict[str, object]:
    return {"layer": row.layer, "pairs": pairs(row.out_features), "energy": row.energy, "change": row.change}

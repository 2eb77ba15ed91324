"""Hyperspherical energy of layers' weights, by the definition of OFT, and its change by an adapter (paper, Fig. 7).

The neurons of a layer are the rows of its (out, in) weight, flattened for a convolution. Divided by their lengths they
are points on a sphere, and so are their negatives. The energy is the sum of 1 / distance over all pairs of these
points. An orthogonal transform of the input keeps the angles between rows, and so the energy.

Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv 2306.07280, and
its public code, whose numbers are means over the pairs of a layer, summed over layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import step_of
from ether_diffusion.generation import checkpoints_of
from ether_diffusion.progress import progress_bar

from . import plots
from .analysed_run import Bases, analysed_runs
from .changes import LayerChange, changes_at_start, changes_of
from .output import check_outputs, plot, write_command, write_table

CHUNK = 512


@torch.no_grad()
def hyperspherical_energy(weight: Tensor, chunk: int = CHUNK) -> float:
    """The energy of one layer: a sum over the `pairs(out)` pairs of its rows and their negatives.

    Computed in fp64 on the weight's device, for `chunk` rows against all others at a time: memory is O(chunk * out).

    Args:
        weight: (out, in) or (out, in, kh, kw), of any floating dtype. A row of zeros counts as orthogonal to all
            others, as in OFT's code.

    Returns:
        Infinity, up to rounding, if two rows have the same or opposite directions.
    """
    x = F.normalize(weight.detach().flatten(1).double(), dim=1)  # (out, in)
    total = x.new_zeros(())
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]
        cosines = rows @ x[start:].T  # (chunk, out - start): each pair of rows once, right of the diagonal
        # ±x_i and ±x_j have four distances: twice |x_i - x_j|, twice |x_i + x_j|.
        both = _inverse_root(2 - 2 * cosines) + _inverse_root(2 + 2 * cosines)
        total += 2 * both.triu(1).sum()
    lengths = x.square().sum(dim=1)  # 1, or 0
    return float(total + _inverse_root(2 + 2 * lengths).sum())  # x_i with its own negative


def pairs(out_features: int) -> int:
    """The number of pairs in the energy of a layer."""
    return out_features * (2 * out_features - 1)


def _inverse_root(squares: Tensor) -> Tensor:
    return squares.clamp_min_(0).rsqrt_()


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one layer.

    Attributes:
        energy: The sum over pairs, for the base's weight.
        change: What the adapter adds to it.
        mean, mean_change: Both divided by the number of pairs, and so comparable between layers.
    """

    layer: str
    out_features: int
    energy: float
    change: float

    @property
    def mean(self) -> float:
        return self.energy / pairs(self.out_features)

    @property
    def mean_change(self) -> float:
        return self.change / pairs(self.out_features)


class BaseEnergies:
    """The energies of a base's layers, computed once for all checkpoints of adapters on that base."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._known: dict[str, float] = {}

    def changes(self, changes: Iterable[LayerChange]) -> Iterator[LayerEnergy]:
        """The energy of every changed layer, and its change by the adapter."""
        for one in changes:
            if one.name not in self._known:
                self._known[one.name] = hyperspherical_energy(one.weight, self.chunk)
            base = self._known[one.name]
            after = hyperspherical_energy(one.weight + one.change, self.chunk)
            yield LayerEnergy(one.name, one.weight.shape[0], base, after - base)


def model_energy(model: nn.Module, chunk: int = CHUNK) -> float:
    """OFT's number for a whole model: the mean over pairs, summed over all linear layers and convolutions."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(hyperspherical_energy(layer.weight, chunk) / pairs(layer.weight.shape[0]) for layer in layers)


_CHANGES = ("change", "mean_change")
_COLUMNS = ("energy", "change", "mean", "mean_change")


def write_energies(
    runs: Sequence[Path], output: Path, command: str, chunk: int = CHUNK, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Measure runs; write `energy.csv`, a row a checkpoint, `layers.csv`, a row a layer of each, and a plot.

    Step 0 is measured where a training did not start at the base; if its start is no longer known, a note says so.

    Raises:
        UserError: as `analysed_runs`, `checkpoints_of` and `changes_of`; or as `check_outputs`. Nothing is written
            then.
    """
    check_outputs(output, "energy.csv", "layers.csv", plots=("energy",))
    bases, known, table, layers = Bases(), {}, [], []
    for run in analysed_runs(list(runs)):
        energies = known.setdefault((run.base_model, run.revision), BaseEnergies(chunk))
        facts = {name: run.facts[name] for name in ("run", "method", "learning_rate")}
        checkpoints = {step_of(folder) or 0: folder for folder in checkpoints_of(run.path).values()}
        first = min(checkpoints)
        with progress_bar(len(checkpoints), facts["run"], "checkpoint") as bar:
            for step, folder in checkpoints.items():
                found = list(energies.changes(changes_of(bases.unet(run), folder, device)))
                if step == first > 0:
                    try:
                        start = list(energies.changes(changes_at_start(bases.unet(run), folder, device)))
                    except UserError as error:
                        print(f"Note: {facts['run']}: no row for step 0: {error}", file=sys.stderr)
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

"""Distances of an adapter: ||T - I||_F and ||W' - W||_F, by layer and averaged (paper, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import plots
from .analysed_run import Bases, analysed_runs
from .changes import LayerChange, changes_of
from .output import check_outputs, plot, write_command, write_table


@dataclass(frozen=True)
class LayerDistance:
    """Frobenius distances of one layer.

    Attributes:
        transform_in, transform_out: ||T - I||_F on the layer's input and output; nan for a side without a transform.
            ETHER: 2 sqrt(n) for n blocks. ETHER+: at most sqrt(2 n). OFT, BOFT: at most 2 sqrt(features). HRA: at most
            2 sqrt(rank). Naive, and the output scales of BOFT and Magnitude: unbounded.
        weight: ||W' - W||_F.
        relative: `weight` divided by ||W||_F.
    """

    layer: str
    out_features: int
    in_features: int
    transform_in: float
    transform_out: float
    weight: float
    relative: float


def distance_of(change: LayerChange) -> LayerDistance:
    """The distances of one layer."""
    weight = float(torch.linalg.vector_norm(change.change))
    base = float(torch.linalg.vector_norm(change.weight))
    return LayerDistance(
        layer=change.name,
        out_features=change.weight.shape[0],
        in_features=change.weight.shape[1],
        transform_in=change.distances.get("in", math.nan),
        transform_out=change.distances.get("out", math.nan),
        weight=weight,
        relative=weight / base if base else math.nan,
    )


def distances(changes: Iterable[LayerChange]) -> list[LayerDistance]:
    """The distances of every layer."""
    return [distance_of(change) for change in changes]


@dataclass(frozen=True)
class MeanDistance:
    """Means over layers; `transform` is a mean over transforms, of which a layer may have two."""

    layers: int
    transform: float
    weight: float
    relative: float


def mean_distance(rows: Sequence[LayerDistance]) -> MeanDistance:
    """The means of one adapter's layers."""
    transforms = [value for row in rows for value in (row.transform_in, row.transform_out)]
    return MeanDistance(
        layers=len(rows),
        transform=_mean([value for value in transforms if not math.isnan(value)]),
        weight=_mean([row.weight for row in rows]),
        relative=_mean([row.relative for row in rows]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


SIDES = {"transform_in": r"input side, $\|T - I\|_F$", "transform_out": r"output side, $\|T - I\|_F$"}


def write_distances(runs: Sequence[Path], output: Path, command: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Measure runs; write `geometry.csv`, a row a run, `layers.csv`, a row a layer, and a plot of each.

    Raises:
        UserError: as `check_outputs`, `analysed_runs` and `changes_of`. Nothing is written then.
    """
    check_outputs(output, "geometry.csv", "layers.csv", plots=("geometry", "layers"))
    bases, means, layers = Bases(), [], []
    for run in analysed_runs(list(runs)):
        found = distances(changes_of(bases.unet(run), run.path, device))
        layers += [{**run.facts, **asdict(row)} for row in found]
        means.append({**run.facts, **asdict(mean_distance(found))})
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

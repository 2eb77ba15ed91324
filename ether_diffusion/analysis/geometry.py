"""Distances of an adapter: ||T - I||_F and ||W' - W||_F, by layer and averaged (paper, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .changes import LayerChange


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

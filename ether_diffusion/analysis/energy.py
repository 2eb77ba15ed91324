"""Hyperspherical energy of layers' weights, by the definition of OFT, and its change by an adapter (paper, Fig. 7).

The neurons of a layer are the rows of its (out, in) weight, flattened for a convolution. Divided by their lengths they
are points on a sphere, and so are their negatives. The energy is the sum of 1 / distance over all pairs of these
points. An orthogonal transform of the input keeps the angles between rows, and so the energy.

Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv 2306.07280, and
its public code, whose numbers are means over the pairs of a layer, summed over layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .changes import LayerChange

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

"""CMMD: how far the generated images' distribution of CLIP features is from the real images' (Jayasumana et al. 2024).

Unlike FID it assumes no Gaussian, and is steady for few images. Computed as the authors' code does, with its constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0
"""Bandwidth of the kernel, and the factor that makes values readable."""


def clip_distance(real: Tensor, generated: Tensor) -> float:
    """`SCALE` times the squared MMD of (N, D) and (M, D) features of length 1 under a Gaussian kernel; 0 or more.

    Features are normalised here. Images count as pairs with themselves, too, as in the authors' code: equal sets have
    distance 0, and two samples of one distribution slightly more.
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (real, generated))
    return max(SCALE * float(_kernel(x, x) + _kernel(y, y) - 2 * _kernel(x, y)), 0.0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean over all pairs of exp(-|x - y|^2 / 2 sigma^2)."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return torch.exp(-squares / (2 * SIGMA**2)).mean()

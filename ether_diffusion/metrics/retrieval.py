"""Identity by retrieval: does an image find the photos of its subject in a gallery of other individuals?

A mean cosine rises with everything that images share: class, colour, place. A ranking among look-alikes does not.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairwise import Pairs

Value = Literal["retrieval", "rank"]
"""retrieval: average precision, in [0, 1]. rank: 1 + how many of the others are nearer than the nearest photo."""
GALLERY = "gallery"
"""The only column of pairs of images and the gallery."""


def retrieved(value: Value, names: list[str], images: Tensor, photos: Tensor, others: Tensor) -> Pairs:
    """A number for each image, from its ranking of the gallery by cosine.

    Args:
        names: Of the images, sorted.
        images, photos, others: (N, D), (P, D) and (G, D) features: of the images, of their subject's photos, and of
            other individuals.
    """
    one, right, wrong = (F.normalize(features.double()) for features in (images, photos, others))
    near, far = one @ right.T, one @ wrong.T
    numbers = rank(near, far) if value == "rank" else average_precision(near, far)
    return Pairs(tuple(names), (GALLERY,), numbers[:, None], torch.ones(len(names), 1, dtype=torch.bool))


def average_precision(near: Tensor, far: Tensor) -> Tensor:
    """(N,) average precision of rankings by (N, P) scores of what belongs and (N, G) of what does not.

    The mean, over what belongs, of the share of what belongs among all that scores at least as much.
    """
    right = (near[:, None, :] >= near[:, :, None]).sum(dim=2)
    wrong = (far[:, None, :] >= near[:, :, None]).sum(dim=2)
    return (right / (right + wrong)).double().mean(dim=1)


def rank(near: Tensor, far: Tensor) -> Tensor:
    """(N,) place, from 1 on, of the first of what belongs in rankings by (N, P) and (N, G) scores."""
    return 1.0 + (far > near.max(dim=1, keepdim=True).values).sum(dim=1).double()

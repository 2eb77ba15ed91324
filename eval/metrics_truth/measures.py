"""Every metric that needs no published weights, of a set of images; and how it follows a fault's degree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.stats
import torch
from PIL import Image

from ether_diffusion.evaluation.intervals import Interval, t_interval
from ether_diffusion.evaluation.quick_scores import score_images
from ether_diffusion.metrics.cmmd import clip_distance
from ether_diffusion.metrics.fid import frechet_distance, kernel_distance
from ether_diffusion.metrics.retrieval import average_precision, rank
from ether_diffusion.metrics.segmentation import SegmentationScore
from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scoring import Scorers

from .faults import Images

HIGHER_IS_BETTER: dict[str, bool] = {
    "backbone": True,
    "CLIP-I": True,
    "CLIP-T": True,
    "settings": True,
    "retrieval": True,
    "rank": False,
    "copies": False,
    "drift": False,
    "FID": False,
    "KID": False,
    "CMMD": False,
    "mIoU": True,
    "accuracy": True,
    "mIoU shortfall": False,
}
"""The metrics, in the order of the table. `backbone` is in the role of DINO and DINOv2."""


def measure(
    scorers: Scorers,
    images: Images,
    photos: Sequence[Image.Image],
    gallery: torch.Tensor,
    real: Sequence[Image.Image],
) -> dict[str, float]:
    """All metrics of a set of images; those of label maps only where the layout is known.

    Args:
        gallery: (G, D) backbone features of other individuals.
        real: Real images of the subject elsewhere, for distances between distributions.
    """
    quick = score_images(scorers, photos, images.images, images.prompts)
    shown, clean = scorers.identity(images.images).double(), scorers.identity(images.clean).double()
    near, far = shown @ scorers.identity(photos).double().T, shown @ gallery.double().T
    reference = scorers.identity(real)
    found = {
        "backbone": quick.identity,
        "CLIP-I": quick.clip_i,
        "CLIP-T": quick.clip_t,
        "settings": quick.settings,
        "copies": quick.copies,
        "retrieval": float(average_precision(near, far).mean()),
        "rank": float(rank(near, far).mean()),
        "drift": float((1 - (shown * clean).sum(dim=1)).mean()),
        "FID": frechet_distance(reference, shown.float()),
        "KID": kernel_distance(reference, shown.float()),
        "CMMD": clip_distance(scorers.image_features(real), scorers.image_features(images.images)),
    }
    if images.labels is not None:
        own, oracle = (
            SegmentationScore(len(LABELS) - 1).update(scorers.segment(kind), images.labels).compute()
            for kind in (images.images, images.clean)
        )
        found |= {
            "mIoU": own["miou"],
            "accuracy": own["pixel_accuracy"],
            "mIoU shortfall": oracle["miou"] - own["miou"],
        }
    return found


def agreement(degrees: Sequence[float], values: Sequence[float], higher_is_better: bool) -> float:
    """Kendall's tau-b of a fault's degrees with how bad a metric finds the images; 0 for a metric that is constant.

    1: the metric gets worse with every step of the fault; -1: better.
    """
    worse = [-value if higher_is_better else value for value in values]
    if any(math.isnan(value) for value in worse) or max(worse) - min(worse) < 1e-9:
        return 0.0
    found: Any = scipy.stats.kendalltau(degrees, worse)
    return float(found.statistic)


def over_subjects(found: Mapping[str, float], level: float = 0.95) -> Interval:
    """The mean of one value a subject, and Student's t interval within [-1, 1]."""
    interval = t_interval(list(found.values()), level)
    return Interval(interval.value, max(interval.low, -1.0), min(interval.high, 1.0))

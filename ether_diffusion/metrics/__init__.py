"""Metrics: `update` takes images or label maps, in batches; `compute` returns the numbers.

`state()` is what one process has seen, and `merge` adds it to another's: the result is the same for any number.
"""

from .clip import ClipTextScore
from .fid import InceptionDistance
from .load_backbones import (
    load_clip,
    load_dino,
    load_dinov2,
    load_inception,
    load_lpips,
    load_tiny_backbone,
    load_tiny_clip,
)
from .lpips import LpipsDiversity, LpipsScore
from .segmentation import SegmentationScore
from .segmenters import load_csail_upernet, load_tiny_segmenter, load_transformers_segmenter
from .similarity import ClipImageScore, DinoScore

__all__ = [
    "ClipImageScore",
    "ClipTextScore",
    "DinoScore",
    "InceptionDistance",
    "LpipsDiversity",
    "LpipsScore",
    "SegmentationScore",
    "load_clip",
    "load_csail_upernet",
    "load_dino",
    "load_dinov2",
    "load_inception",
    "load_lpips",
    "load_tiny_backbone",
    "load_tiny_clip",
    "load_tiny_segmenter",
    "load_transformers_segmenter",
]

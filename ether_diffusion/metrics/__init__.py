"""Metrics: each takes images or label maps by `update`, in batches, and gives its numbers by `compute`.

What one process has seen is its `state()`, which another takes in by `merge`: any number of them give the same.
"""

from .clip import ClipImageScore, ClipTextScore
from .dino import DinoScore
from .fid import InceptionDistance
from .load_backbones import load_clip, load_dino, load_inception, load_lpips, load_tiny_backbone, load_tiny_clip
from .lpips import LpipsDiversity, LpipsScore
from .segmentation import SegmentationScore
from .segmenters import load_csail_upernet, load_tiny_segmenter, load_transformers_segmenter

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
    "load_inception",
    "load_lpips",
    "load_tiny_backbone",
    "load_tiny_clip",
    "load_tiny_segmenter",
    "load_transformers_segmenter",
]

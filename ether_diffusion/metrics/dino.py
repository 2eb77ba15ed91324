"""DINO: how like the subject's photos the generated images are, by a network that tells individuals apart.

Ruiz et al. 2022, DreamBooth, section 4.2: mean cosine of ViT-S/16 DINO class tokens.
"""

from __future__ import annotations

from .similarity import ImageSimilarity


class DinoScore(ImageSimilarity):
    """Of a `DinoBackbone`'s features, in [-1, 1]; higher is more alike."""

    name = "DINO"

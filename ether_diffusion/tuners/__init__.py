"""Two methods of the ETHER paper's comparison that PEFT lacks, as PEFT methods. Importing this makes PEFT know them.

Naive: OFT without orthogonality. Magnitude: one scale for each row of a weight, for re-fitting after OFT.
"""

from __future__ import annotations

from ether_diffusion.ether.registry import register

from .config import MagnitudeConfig, NaiveConfig, TunerPeftType
from .layer import MagnitudeLayer, NaiveLayer
from .model import MagnitudeModel, NaiveModel

__all__ = [
    "MagnitudeConfig",
    "MagnitudeLayer",
    "MagnitudeModel",
    "NaiveConfig",
    "NaiveLayer",
    "NaiveModel",
    "TunerPeftType",
]

register(TunerPeftType.NAIVE, NaiveConfig, NaiveModel)
register(TunerPeftType.MAGNITUDE, MagnitudeConfig, MagnitudeModel)

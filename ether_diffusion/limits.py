"""The types of numbers in settings. Each has limits; a number beyond them cannot be meant, and is refused as a typo."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=10**4)]
"""Of images, samples and passes, which memory or an evening bounds."""
Many = Annotated[int, Field(ge=1, le=10**6)]
"""Of images in a folder, or of scenes."""
Steps = Annotated[int, Field(ge=1, le=10**9)]
Side = Annotated[int, Field(ge=1, le=8192)]
"""In pixels."""
Workers = Annotated[int, Field(ge=1, le=1024)]
"""Processes, threads, or images that share a forward pass."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Rank = Annotated[int, Field(ge=1, le=4096)]
"""Beyond the widths of Stable Diffusion's layers: a larger one is a mistake, and would ask for the memory."""
Blocks = Annotated[int, Field(ge=1, le=2**16)]
"""Diagonal blocks of a transform; each layer's width bounds them further."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, or a probability."""
ShareBelowAll = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(ge=0, le=1000)]
"""A factor, a weight of a loss, or a learning rate."""
PositiveStrength = Annotated[float, Field(gt=0, le=1000)]
SignedStrength = Annotated[float, Field(ge=-1000, le=1000)]
Bound = Annotated[float, Field(gt=0, le=10**6)]
"""Of a norm or a ratio."""

"""Helpers of the stages: half precision, and images of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ENLARGE = 2


def half(tensor: Tensor) -> torch.autocast:
    """bf16 for the matrix products of a forward pass on this tensor's device; weights and optimiser stay fp32."""
    return torch.autocast(tensor.device.type, torch.bfloat16)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in ±1 as PIL images."""
    rows = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]


def side_by_side(rows: Sequence[Tensor]) -> Image.Image:
    """A page of rows of images, each (B, 3, H, W) in ±1, enlarged without smoothing."""
    page = np.concatenate([np.concatenate([np.asarray(i) for i in to_images(row)], axis=1) for row in rows], axis=0)
    image = Image.fromarray(page)
    return image.resize((image.width * ENLARGE, image.height * ENLARGE), Image.Resampling.NEAREST)

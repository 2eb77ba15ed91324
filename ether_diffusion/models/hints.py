"""Hints for a pipeline: pictures or tensors -> one batch in [0, 1], and the size of the images that they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError


def read_hints(
    pipeline: Any, image: Any, height: int | None, width: int | None, prompts: int
) -> tuple[Tensor, int, int]:
    """Hints as (B, 3, height, width) in [0, 1], fp32; and height and width.

    Args:
        pipeline: Whose UNet and VAE say how sides are halved.
        image: RGB pictures, or tensors (3, H, W) or (B, 3, H, W) in [0, 1]. A picture of another size is resized to its
            nearest pixels, so that a painted map keeps its colours; a tensor must have the images' size.
        height, width: Of the images. Default: the first hint's; a picture's is rounded down to what the UNet halves
            evenly.
        prompts: How many there are; there is one hint for all of them, or one for each.

    Raises:
        UserError: no hint, one of a wrong kind, size or range, or another number of hints than of prompts.
    """
    hints = _as_list(image)
    height, width = height or _side(pipeline, hints[0], 0), width or _side(pipeline, hints[0], 1)
    batch = torch.stack([_pixels(hint, height, width) for hint in hints])
    if len(batch) not in (1, prompts):
        raise UserError(f"image: {len(batch)} hints for {prompts} prompts; give one, or one for each.")
    return batch, height, width


def number_of_prompts(prompt: str | list[str] | None, others: dict[str, Any]) -> int:
    """As diffusers' pipelines count: texts, or embeddings among the other arguments."""
    return len(others["prompt_embeds"]) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)


def check_span(start: float, end: float) -> None:
    """Refuse fractions of the steps that are out of order."""
    if not 0 <= start < end <= 1:
        raise UserError(
            f"control_guidance_start, control_guidance_end: {start}, {end}; expected 0 <= start < end <= 1."
        )


def _side(pipeline: Any, hint: Image.Image | Tensor, axis: int) -> int:
    """Height (axis 0) or width (axis 1) of an image that a hint is to fill."""
    if isinstance(hint, Tensor):
        return hint.shape[axis - 2]
    multiple = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
    return max(1, (hint.height, hint.width)[axis] // multiple) * multiple


def _as_list(image: Any) -> list[Any]:
    """Hints one by one: pictures, and tensors of three dimensions."""
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    hints = list(image) if isinstance(image, (list, tuple)) else [image]
    for hint in hints:
        if not isinstance(hint, (Image.Image, Tensor)):
            raise UserError(f"image: {type(hint).__name__}; expected an RGB picture or a tensor, or a list of them.")
    if not hints:
        raise UserError("image: no hint; expected one, or one for each prompt.")
    return hints


def _pixels(hint: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """A hint as (3, height, width) in [0, 1], fp32."""
    if isinstance(hint, Image.Image):
        if hint.mode != "RGB":
            raise UserError(
                f"image: a picture of mode {hint.mode}; a hint is RGB. A label map has to be painted first; anything "
                'else, hint.convert("RGB").'
            )
        pixels = torch.from_numpy(np.array(hint.resize((width, height), Image.Resampling.NEAREST)))
        return pixels.permute(2, 0, 1).float() / 255
    if tuple(hint.shape) != (3, height, width):
        raise UserError(f"image: a tensor {tuple(hint.shape)}; expected {(3, height, width)}, the images' size.")
    if not ((hint >= 0) & (hint <= 1)).all():
        low, high = float(hint.min()), float(hint.max())
        raise UserError(f"image: values from {low:.4g} to {high:.4g}; a hint's are from 0 to 1.")
    return hint.float()

"""Hints for pipelines: the call that both kinds of pipeline share, and images or tensors -> one batch in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError


class HintPipeline:
    """The arguments, checks and defaults of a pipeline with hints; a base class to put before diffusers' own."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | Tensor | Sequence[Image.Image] | Sequence[Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        eta: float = 0.0,
        condition_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        num_images_per_prompt: int = 1,
        **others: Any,
    ) -> Any:
        """Generate images. Both branches of classifier-free guidance get the hint, so that it guides by the text alone.

        Args:
            image: Hints: RGB images, or tensors (3, H, W) or (B, 3, H, W) in [0, 1]. One for all prompts, or one for
                each. An image of another size is resized to its nearest pixels, so that a painted map keeps its
                colours; a tensor must have the size of the generated images.
            height, width: Of the generated images. Default: the first hint's; an image's is rounded down to what the
                UNet halves evenly.
            condition_scale: Factor of what the hint adds: 0 is the UNet without the hint, 1 as trained.
            control_guidance_start, control_guidance_end: The fractions of the steps between which the hint is given,
                as in diffusers' ControlNet pipelines.
            others: The other arguments of the diffusers pipeline.

        Raises:
            UserError: no hint, one of a wrong kind, size or range, another number of hints than of prompts, or
                fractions out of order.
        """
        span = control_guidance_start, control_guidance_end
        if not 0 <= span[0] < span[1] <= 1:
            raise UserError(
                f"control_guidance_start, control_guidance_end: {span[0]}, {span[1]}; expected 0 <= start < end <= 1."
            )
        hints = _as_list(image)
        height, width = height or _side(self, hints[0], 0), width or _side(self, hints[0], 1)
        batch = torch.stack([_pixels(hint, height, width) for hint in hints])
        # As diffusers' pipelines count: texts, or embeddings among the other arguments.
        prompts = len(others["prompt_embeds"]) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        if len(batch) not in (1, prompts):
            raise UserError(f"image: {len(batch)} hints for {prompts} prompts; give one, or one for each.")
        settings = {"prompt": prompt, "height": height, "width": width, "num_inference_steps": num_inference_steps}
        settings |= {"guidance_scale": guidance_scale, "eta": eta, "num_images_per_prompt": num_images_per_prompt}
        return self._sample(batch, condition_scale, span, {**settings, **others})

    def _sample(self, hints: Tensor, scale: float, span: tuple[float, float], settings: dict[str, Any]) -> Any:
        """Call the diffusers pipeline with hints (B, 3, height, width) in [0, 1], fp32."""
        raise NotImplementedError


def _side(pipeline: Any, hint: Image.Image | Tensor, axis: int) -> int:
    """Height (axis 0) or width (axis 1) of the image for a hint."""
    if isinstance(hint, Tensor):
        return hint.shape[axis - 2]
    multiple = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
    return max(1, (hint.height, hint.width)[axis] // multiple) * multiple


def _as_list(image: Any) -> list[Any]:
    """Hints one by one: images, and tensors of three dimensions."""
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    hints = list(image) if isinstance(image, (list, tuple)) else [image]
    for hint in hints:
        if not isinstance(hint, (Image.Image, Tensor)):
            raise UserError(f"image: {type(hint).__name__}; expected an RGB image or a tensor, or a list of them.")
    if not hints:
        raise UserError("image: no hint; expected one, or one for each prompt.")
    return hints


def _pixels(hint: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """A hint as (3, height, width) in [0, 1], fp32."""
    if isinstance(hint, Image.Image):
        if hint.mode != "RGB":
            raise UserError(
                f"image: an image of mode {hint.mode}; a hint is RGB. A label map has to be painted first; anything "
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

"""ControlNet (arXiv 2302.05543) by diffusers' own class: built from a UNet, trained with it, used in a pipeline."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.randomness import derive_seed, seeded

from .condition_encoder import channels_for
from .controllable_pipeline import ControllablePipeline, ControllableXLPipeline
from .hints import HintPipeline
from .module_files import CONFIG, load_module

WHAT = "ControlNet"


def build_controlnet(unet: nn.Module, vae_factor: int, seed: int = 0) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's first half and adds nothing yet, in fp32.

    Args:
        unet: A `UNet2DConditionModel`, whose weights are copied.
        vae_factor: Pixels per latent along one side, which the hint block reduces.
        seed: Of the hint block's initial weights. The global generator does not change.

    Raises:
        UserError: as `channels_for`.
    """
    channels = channels_for(vae_factor)
    source: Any = unet
    with seeded(derive_seed(seed, "controlnet-init")):
        return ControlNetModel.from_unet(source, conditioning_embedding_out_channels=channels)


def load_controlnet(folder: str | Path, unet: nn.Module, vae_factor: int) -> ControlNetModel:
    """Read a saved ControlNet for this UNet. Results and errors: see `load_module` and `check_controlnet`."""
    where = f"{Path(folder) / CONFIG}: "
    return load_module(ControlNetModel, folder, WHAT, lambda saved: check_controlnet(saved, unet, vae_factor, where))


def check_controlnet(controlnet: nn.Module, unet: nn.Module, vae_factor: int, where: str = "") -> None:
    """Refuse a ControlNet that was built for another kind of UNet or VAE. `where` is put before the message."""
    own: Any = controlnet.config
    base: Any = unet.config
    names = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    factor = 2 ** (len(own["conditioning_embedding_out_channels"]) - 1)
    pairs = [(name, json.dumps(own[name]), json.dumps(base[name])) for name in names]  # lists and tuples are equal
    pairs.append(("pixels per latent", str(factor), str(vae_factor)))
    wrong = [f"{name} {found}, not {wanted}" for name, found, wanted in pairs if found != wanted]
    if wrong:
        raise UserError(f"{where}the ControlNet does not fit the base: {'; '.join(wrong)}.")


class ControlledUNet(nn.Module):
    """A UNet and its ControlNet: all that a ControlNet run trains, in one module."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        **others: Any,
    ) -> Tensor:
        """Predict noise or velocity (B, C, h, w); the arguments are those of `ConditionedUNet`."""
        own, dtype = next(self.controlnet.parameters()).dtype, noisy_latents.dtype
        down, middle = self.controlnet(
            noisy_latents.to(own),
            timesteps,
            encoder_hidden_states.to(own),
            controlnet_cond=hint.to(own),
            return_dict=False,
            **others,
        )
        return self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states,
            down_block_additional_residuals=[features.to(dtype) for features in down],
            mid_block_additional_residual=middle.to(dtype),
            **others,
        ).sample


class _ControlNetPipeline(HintPipeline):
    """Samples with a ControlNet; before a pipeline of diffusers, whose call it uses."""

    def _sample(self, hints: Tensor, scale: float, span: tuple[float, float], settings: dict[str, Any]) -> Any:
        return super(HintPipeline, self).__call__(  # pyright: ignore - of diffusers' pipeline
            image=hints,
            controlnet_conditioning_scale=float(scale),
            control_guidance_start=span[0],
            control_guidance_end=span[1],
            **settings,
        )


class ControlNetPipeline(_ControlNetPipeline, StableDiffusionControlNetPipeline):
    """diffusers' own pipeline, with the arguments, checks and defaults of `ControllablePipeline`.

    `base.pipeline(ControlNetPipeline, controlnet=…)` makes one of a base's parts.

    Args:
        controlnet: One `ControlNetModel`; the rest as for StableDiffusionControlNetPipeline.

    Raises:
        UserError: the ControlNet does not fit the UNet or the VAE.
    """

    @functools.wraps(StableDiffusionControlNetPipeline.__init__)  # diffusers reads the names of parts from it
    def __init__(self, *parts: Any, **named_parts: Any) -> None:
        super().__init__(*parts, **named_parts)
        check_controlnet(self.controlnet, self.unet, self.vae_scale_factor)


class ControlNetXLPipeline(_ControlNetPipeline, StableDiffusionXLControlNetPipeline):
    """The same for Stable Diffusion XL."""

    @functools.wraps(StableDiffusionXLControlNetPipeline.__init__)
    def __init__(self, *parts: Any, **named_parts: Any) -> None:
        super().__init__(*parts, **named_parts)
        check_controlnet(self.controlnet, self.unet, self.vae_scale_factor)


CONTROLNET_PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": ControlNetPipeline,
    "StableDiffusionXLPipeline": ControlNetXLPipeline,
}
"""By the class of a family's own pipelines."""

ConditionedPipeline = ControllablePipeline | ControllableXLPipeline | ControlNetPipeline | ControlNetXLPipeline
"""A pipeline whose images follow hints: with a condition encoder, or with a ControlNet."""

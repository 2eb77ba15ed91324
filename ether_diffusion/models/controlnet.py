"""ControlNet (arXiv 2302.05543) by diffusers' own class: made of a UNet, run beside it, and drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.randomness import derive_seed

from .bases import Base
from .condition_encoder import channels_for
from .controllable_pipeline import ControllablePipeline
from .hints import check_span, number_of_prompts, read_hints
from .module_files import CONFIG, fill_module

FOLDER, WHAT = "controlnet", "ControlNet"


def build_controlnet(unet: nn.Module, vae_factor: int, seed: int = 0) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's first half and adds nothing yet, in fp32.

    Args:
        unet: A `UNet2DConditionModel`, whose weights are copied.
        vae_factor: Pixels a latent along one side; its hint block halves as often.
        seed: Of the hint block's initial weights. The global generators stay as they are.

    Raises:
        UserError: a VAE factor that the hint block has no convolutions for.
    """
    channels = channels_for(vae_factor)
    source: Any = unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "controlnet-init"))
        return ControlNetModel.from_unet(source, conditioning_embedding_out_channels=channels)


def load_controlnet(folder: str | Path, unet: nn.Module, vae_factor: int) -> ControlNetModel:
    """Read a saved ControlNet for this UNet, in fp32 on the CPU, frozen.

    Raises:
        UserError: as `check_module`; or it was made for another kind of UNet or VAE.
    """
    config: Any = ControlNetModel.load_config(folder)
    with torch.device("meta"):
        controlnet: Any = ControlNetModel.from_config(config)
    check_controlnet(controlnet, unet, vae_factor, f"{Path(folder) / CONFIG}: ")
    controlnet = controlnet.to_empty(device="cpu")
    fill_module(controlnet, folder, WHAT)
    return controlnet.eval().requires_grad_(False)


def check_controlnet(controlnet: nn.Module, unet: nn.Module, vae_factor: int, where: str = "") -> None:
    """Refuse a ControlNet whose features do not fit a UNet. `where` stands before the message.

    Raises:
        UserError: what differs.
    """
    own: Any = controlnet.config
    base: Any = unet.config
    pairs: list[tuple[str, Any, Any]] = [
        (name, _plain(own[name]), _plain(base[name]))
        for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    ]
    pairs.append(("pixels a latent", 2 ** (len(own["conditioning_embedding_out_channels"]) - 1), vae_factor))
    wrong = [f"{name} {found}, not {wanted}" for name, found, wanted in pairs if found != wanted]
    if wrong:
        raise UserError(f"{where}the ControlNet does not fit the base: {'; '.join(wrong)}.")


class ControlledUNet(nn.Module):
    """A UNet and its ControlNet: all that a ControlNet run trains, in one module."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, hint: Tensor) -> Tensor:
        """Predict noise or velocity (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w), in the UNet's dtype.
            timesteps: (B,).
            encoder_hidden_states: (B, 77, D), in the UNet's dtype.
            hint: (B, 3, H, W) in [0, 1], in any dtype.
        """
        own, dtype = next(self.controlnet.parameters()).dtype, noisy_latents.dtype
        down, middle = self.controlnet(
            noisy_latents.to(own),
            timesteps,
            encoder_hidden_states.to(own),
            controlnet_cond=hint.to(own),
            return_dict=False,
        )
        return self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states,
            down_block_additional_residuals=[features.to(dtype) for features in down],
            mid_block_additional_residual=middle.to(dtype),
        ).sample


def controlnet_pipeline(base: Base, controlnet: ControlNetModel) -> ControlNetPipeline:
    """A base's parts and a ControlNet as a pipeline, without a safety checker.

    Raises:
        UserError: the ControlNet does not fit the base.
    """
    return ControlNetPipeline(**base.pipeline().components, controlnet=controlnet, requires_safety_checker=False)


class ControlNetPipeline(StableDiffusionControlNetPipeline):
    """diffusers' own pipeline, with the arguments, checks and defaults of `ControllablePipeline`.

    Args:
        controlnet: One `ControlNetModel`; the rest as for StableDiffusionControlNetPipeline.

    Raises:
        UserError: the ControlNet does not fit the UNet or the VAE.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            controlnet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        check_controlnet(controlnet, unet, self.vae_scale_factor)

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
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
        """Draw images. The hint stays in both branches of classifier-free guidance; the text alone is guided by.

        Args:
            condition_scale: Factor of what the ControlNet adds: 0 is the UNet without the hint, 1 as trained.
            others: Whatever else StableDiffusionControlNetPipeline takes. The rest as for `ControllablePipeline`.

        Raises:
            UserError: as `ControllablePipeline`.
        """
        check_span(control_guidance_start, control_guidance_end)
        batch, height, width = read_hints(self, image, height, width, number_of_prompts(prompt, others))
        text: Any = prompt  # None where embeddings are given; diffusers' annotation lacks that
        hints: Any = batch
        return super().__call__(
            text,
            hints,
            height,
            width,
            num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            controlnet_conditioning_scale=float(condition_scale),
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            num_images_per_prompt=num_images_per_prompt,
            **others,
        )


ConditionedPipeline = ControllablePipeline | ControlNetPipeline
"""What draws under hints: with an encoder, or with a ControlNet."""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value

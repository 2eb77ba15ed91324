"""Images that follow a condition: diffusers' StableDiffusionPipeline with an encoder whose features its UNet gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .bases import Base
from .condition_encoder import ConditionEncoder
from .conditioning import added_features
from .hints import check_span, number_of_prompts, read_hints


def controllable_pipeline(base: Base, encoder: ConditionEncoder, **components: Any) -> ControllablePipeline:
    """A base's parts and an encoder as a pipeline, without a safety checker. `components` as for `Base.pipeline`.

    Raises:
        UserError: the encoder does not fit the base.
    """
    parts = base.pipeline(**components).components
    return ControllablePipeline(**parts, condition_encoder=encoder, requires_safety_checker=False)


class ControllablePipeline(StableDiffusionPipeline):
    """Text and a hint to images. Apart from the hint, it is StableDiffusionPipeline with all that belongs to it.

    `from_pretrained` of this class reads what `save_pretrained` wrote.

    Args:
        condition_encoder: Whose features the UNet gets, added after its first convolution; the rest as for
            StableDiffusionPipeline.

    Raises:
        UserError: the encoder's features are not as wide as the UNet's, or do not stand for one latent each.
    """

    model_cpu_offload_seq = "condition_encoder->text_encoder->image_encoder->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        condition_encoder: ConditionEncoder,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(condition_encoder=condition_encoder)
        found = condition_encoder.config["out_channels"], condition_encoder.factor
        wanted = unet.config["block_out_channels"][0], self.vae_scale_factor
        if found != wanted:
            raise UserError(
                f"condition encoder: its features have {found[0]} channels and {found[1]} pixels a side; this base "
                f"takes {wanted[0]} and {wanted[1]}."
            )

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
            image: Hints: RGB pictures, or tensors (3, H, W) or (B, 3, H, W) in [0, 1]. One for all prompts, or one for
                each. A picture of another size is resized to its nearest pixels, so that a painted map keeps its
                colours; a tensor must have the images' size.
            height, width: Of the images. Default: the first hint's; a picture's is rounded down to what the UNet
                halves evenly.
            condition_scale: Factor of the features: 0 is the UNet without the hint, 1 as trained.
            control_guidance_start, control_guidance_end: From what fraction of the steps on, and up to what fraction,
                the hint is given, as in diffusers' ControlNet pipelines.
            others: Whatever else StableDiffusionPipeline takes.

        Raises:
            UserError: no hint, one of a wrong kind, size or range, another number of hints than of prompts, or
                fractions out of order.
        """
        check_span(control_guidance_start, control_guidance_end)
        batch, height, width = read_hints(self, image, height, width, number_of_prompts(prompt, others))
        encoder = self.condition_encoder
        features = encoder(batch.to(self._execution_device, encoder.dtype)) * condition_scale
        if len(batch) > 1:
            features = features.repeat_interleave(num_images_per_prompt, dim=0)

        start, end, steps = control_guidance_start, control_guidance_end, 1
        partial = (start, end) != (0, 1)
        if partial:
            given = {name: others.get(name) for name in ("timesteps", "sigmas")}
            timesteps: Any = retrieve_timesteps(self.scheduler, num_inference_steps, self._execution_device, **given)[0]
            steps = len(timesteps)

        def features_at(step: int) -> Tensor | None:
            return features if start <= step / steps and (step + 1) / steps <= end else None

        text: Any = prompt  # None where embeddings are given; diffusers' annotation lacks that
        with added_features(self.unet, features_at(0)) as stand_in:
            if partial:
                _before_next_step(others, lambda step: setattr(stand_in, "features", features_at(step)))
            return super().__call__(
                text,
                height,
                width,
                num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                num_images_per_prompt=num_images_per_prompt,
                **others,
            )


def _before_next_step(arguments: dict[str, Any], act: Callable[[int], None]) -> None:
    """Call `act(k)` between steps k - 1 and k, in front of the callback that the arguments may hold."""
    callback = arguments.get("callback_on_step_end")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        act(step + 1)
        return callback(pipeline, step, timestep, tensors) if callback else tensors

    arguments["callback_on_step_end"] = after_step

"""Images that follow a condition: diffusers' own pipelines with the features of a condition encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from ether_diffusion.errors import UserError

from .condition_encoder import ConditionEncoder
from .conditioning import added_features
from .hints import HintPipeline


class _FeaturePipeline(HintPipeline):
    """Samples with a condition encoder's features; before a pipeline of diffusers, whose call it uses."""

    def _add_encoder(self, condition_encoder: ConditionEncoder) -> None:
        """Register the encoder. Raises UserError: its features do not fit the base."""
        pipeline: Any = self
        pipeline.register_modules(condition_encoder=condition_encoder)
        found = condition_encoder.config["out_channels"], condition_encoder.factor
        expected = pipeline.unet.config["block_out_channels"][0], pipeline.vae_scale_factor
        if found != expected:
            raise UserError(
                f"condition encoder: its features have {found[0]} channels and {found[1]} pixels a side; this base "
                f"takes {expected[0]} and {expected[1]}."
            )

    def _sample(self, hints: Tensor, scale: float, span: tuple[float, float], settings: dict[str, Any]) -> Any:
        pipeline: Any = self
        encoder = pipeline.condition_encoder
        features = encoder(hints.to(pipeline._execution_device, encoder.dtype)) * scale
        if len(hints) > 1:
            features = features.repeat_interleave(settings["num_images_per_prompt"], dim=0)

        (start, end), steps = span, 1
        partial = span != (0, 1)
        if partial:
            given = {name: settings.get(name) for name in ("timesteps", "sigmas")}
            count, device = settings["num_inference_steps"], pipeline._execution_device
            timesteps: Any = retrieve_timesteps(pipeline.scheduler, count, device, **given)[0]
            steps = len(timesteps)

        def features_at(step: int) -> Tensor | None:
            return features if start <= step / steps and (step + 1) / steps <= end else None

        with added_features(pipeline.unet, features_at(0)) as stand_in:
            if partial:
                _before_next_step(settings, lambda step: setattr(stand_in, "features", features_at(step)))
            return super(HintPipeline, self).__call__(**settings)  # pyright: ignore - of diffusers' pipeline


class ControllablePipeline(_FeaturePipeline, StableDiffusionPipeline):
    """Text and a hint to images; apart from the hint, it is StableDiffusionPipeline.

    `base.pipeline(ControllablePipeline, condition_encoder=…)` makes one of a base's parts, and `from_pretrained` of
    this class reads what `save_pretrained` wrote.

    Args:
        condition_encoder: Its features are added after the UNet's first convolution. The rest as for
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
        parts = vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder
        super().__init__(*parts, requires_safety_checker)
        self._add_encoder(condition_encoder)


class ControllableXLPipeline(_FeaturePipeline, StableDiffusionXLPipeline):
    """The same for Stable Diffusion XL: apart from the hint, it is StableDiffusionXLPipeline."""

    model_cpu_offload_seq = "condition_encoder->text_encoder->text_encoder_2->image_encoder->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        condition_encoder: ConditionEncoder,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        parts = vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler
        super().__init__(*parts, image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker)
        self._add_encoder(condition_encoder)


PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": ControllablePipeline,
    "StableDiffusionXLPipeline": ControllableXLPipeline,
}
"""By the class of a family's own pipelines."""


def _before_next_step(arguments: dict[str, Any], act: Callable[[int], None]) -> None:
    """Call `act(k)` between steps k - 1 and k, before a callback that is among the arguments."""
    callback = arguments.get("callback_on_step_end")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        act(step + 1)
        return callback(pipeline, step, timestep, tensors) if callback else tensors

    arguments["callback_on_step_end"] = after_step

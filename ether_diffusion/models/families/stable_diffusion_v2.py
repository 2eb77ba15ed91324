"""Stable Diffusion v2: v1's pipeline with another text encoder, linear projections around attention, and velocity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .stable_diffusion_v1 import StableDiffusion1


class StableDiffusion2(StableDiffusion1):
    """Its 512-pixel bases predict noise, its 768-pixel ones velocity: the base's scheduler states which."""

    name = "sd2"
    title = "Stable Diffusion v2"
    original_layout = False

    def is_of(self, pipeline_class: str, denoiser_config: Mapping[str, Any]) -> bool:
        return super(StableDiffusion1, self).is_of(pipeline_class, denoiser_config) and bool(
            denoiser_config.get("use_linear_projection")
        )

    def kohya_facts(self, prediction_type: str) -> dict[str, str]:
        kind = "v2-512" if prediction_type == "epsilon" else "v2-768-v"
        return self._kohya_facts("sd_v2", f"stable-diffusion-{kind}", v2=True)

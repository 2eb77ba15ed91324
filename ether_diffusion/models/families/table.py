"""The table of families. A new one is a file here, and its entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ether_diffusion.errors import UserError

from .family import Family
from .flux_1 import Flux1
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_v1 import StableDiffusion1
from .stable_diffusion_v2 import StableDiffusion2
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    StableDiffusion1(),
    StableDiffusion2(),
    StableDiffusionXL(),
    StableDiffusion3(),
    Flux1(),
    ZImage(),
)
"""In the order in which they are asked whether a pipeline is theirs."""
DEFAULT = FAMILIES[0]


def family_for(pipeline_class: Any, denoiser_config: Mapping[str, Any] | None = None) -> Family:
    """The family of a pipeline's class and, if several have it, of its denoiser's config.

    Raises:
        UserError: it is in no family.
    """
    config = denoiser_config or {}
    found = next((family for family in FAMILIES if family.is_of(pipeline_class, config)), None)
    if found is None:
        titles: dict[str, list[str]] = {}
        for family in FAMILIES:
            titles.setdefault(family.pipeline_class, []).append(family.title)
        known = ", ".join(f"{name} ({' and '.join(own)})" for name, own in titles.items())
        raise UserError(f"a {pipeline_class}; ether_diffusion trains {known}.")
    return found


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline of diffusers, or of one that takes conditions. Raises UserError as `family_for`."""
    classes = [kind.__name__ for kind in type(pipeline).__mro__]
    known = {name for family in FAMILIES for name in (family.pipeline_class, *family.other_pipelines)}
    return family_for(next((name for name in classes if name in known), classes[0]), denoiser_of(pipeline).config)


def denoiser_of(pipeline: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    unet = getattr(pipeline, "unet", None)
    return pipeline.transformer if unet is None else unet

"""What the arguments of `ether-diffusion generate` say: a pipeline, how it samples, the prompts."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, TypeVar

import pydantic
from diffusers import StableDiffusionPipeline

from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, SavedRun, load_pipeline, read_prompts
from ether_diffusion.models.saved_modules import SavedModule

S = TypeVar("S", bound=Sampling)


def load(
    arguments: Namespace, run: SavedRun | None, *, with_adapter: bool = True
) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """A pipeline, and what an image's file says of the models in it.

    Args:
        with_adapter: False: the base alone; of a controllable run, a pipeline that still takes hints.
    """
    base_model = arguments.base_model or (run.base_model if run else None)
    vae = arguments.vae or (run.vae if run else None)
    takes_hints = run is not None and run.condition_encoder is not None
    # What follows conditions by a ControlNet alone draws as the base does under a condition_scale of 0.
    has_scale = not takes_hints or not (run and isinstance(run.adapter, SavedModule))
    scale = arguments.scale if with_adapter else 0.0 if has_scale else 1.0
    pipeline, saved = load_pipeline(
        arguments.adapter if with_adapter or takes_hints else None,
        base_model=base_model,
        revision=run.revision if run and base_model == run.base_model else None,
        vae=vae,
        allow_pickle=arguments.allow_pickle,
        scale=scale,
        merged=arguments.merge and with_adapter,
        device=arguments.device,
        dtype=arguments.dtype,
        resolution=arguments.resolution,
        quantization=arguments.quantization,
        offload=arguments.offload,
    )
    facts: dict[str, Any] = {"base_model": base_model, "dtype": arguments.dtype}
    if arguments.quantization is not None:
        facts["quantization"] = arguments.quantization
    if vae is not None:
        facts["vae"] = vae
    if saved is not None and with_adapter:
        facts |= {"adapter": saved.digest, "scale": scale, "merged": arguments.merge}
    return pipeline, facts


def sampling_of(kind: type[S], arguments: Namespace) -> S:
    """The settings that were given, and the defaults of this kind of run for the others.

    Raises:
        UserError: a value out of range.
    """
    given = {name: getattr(arguments, name) for name in kind.model_fields if getattr(arguments, name) is not None}
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        flag = "".join(f"--{str(name).replace('_', '-')} {fault['input']}: " for name in fault["loc"])
        raise UserError(f"generate: {flag}{fault['msg'].removeprefix('Value error, ')}.") from error


def prompts_of(arguments: Namespace) -> list[str] | None:
    """The one that was given, or those of the file that was; None: neither was."""
    if arguments.prompt is not None:
        return [arguments.prompt]
    return read_prompts(arguments.prompts) if arguments.prompts is not None else None


def given_flags(arguments: Namespace, *names: str) -> list[str]:
    """Which of these settings were given, as the user writes them."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]

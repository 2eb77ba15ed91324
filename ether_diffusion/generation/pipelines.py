"""A pipeline assembled from a base and what a run folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline

from ether_diffusion.adapters.attach import merge, set_scale
from ether_diffusion.adapters.loading import load_adapter, merge_saved
from ether_diffusion.adapters.peft_layers import check_sequential_offload
from ether_diffusion.adapters.phases import BEFORE, TEXT_ENCODER
from ether_diffusion.adapters.storage import SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import check_resolution, load_base, move
from ether_diffusion.models.condition_encoder import load_condition_encoder
from ether_diffusion.models.controllable_pipeline import controllable_pipeline
from ether_diffusion.models.controlnet import controlnet_pipeline, load_controlnet
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.quantized import check_quantization, quantize
from ether_diffusion.models.saved_modules import UNET, SavedModule

from .saved_run import read_run


def load_pipeline(
    adapter: str | Path | None = None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    allow_pickle: bool = False,
    scale: float = 1.0,
    merged: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    resolution: int | None = None,
    quantization: str | None = None,
    offload: Literal["none", "model", "sequential"] = "none",
) -> tuple[StableDiffusionPipeline, SavedAdapter | SavedModule | None]:
    """A diffusers pipeline with a saved adapter in it, or a whole module, ready to draw.

    Args:
        adapter: As for `read_run`; None: the base alone.
        base_model: Hub name, folder, single file or `tiny`; default: the one the run was trained on, in its revision.
        revision: Branch, tag or commit of a hub name.
        vae: Another VAE than the base's own; default: the one that the adapter was trained with.
        allow_pickle: Let a `.ckpt` run code of its own while it is read. Never taken from a run.
        scale: The adapter's strength: 0 the base, 1 as trained. Of a whole UNet: how far its weights are gone from the
            base's to the trained ones. What an adapter was trained after is its base. A ControlNet has none.
        merged: Write the adapter into the base's weights: no extra work an image, no way back.
        device, dtype: Default: CUDA in fp16, else MPS or the CPU in fp32.
        resolution: Side of the images to come, checked against what the base can draw.
        quantization: Of the UNet's linear layers, as for `quantize`; None: as they were saved.
        offload: Where parts wait that do not run: on the device (`none`), or on the CPU, whole models (`model`) or
            layers (`sequential`), as in diffusers.

    Returns:
        The pipeline, without a safety checker, and what is known of the adapter, if there is one. Of a controllable
        run it is a `ControllablePipeline`, or a `ControlNetPipeline`.

    Raises:
        UserError: no run there, no such base, or parts of the two do not fit; or settings that exclude each other.
    """
    check_quantization(quantization)
    if quantization is not None and merged:
        raise UserError("--merge cannot write into quantised weights. Leave out --merge, or --quantization.")
    if quantization is not None and offload == "sequential":
        raise UserError("--offload sequential and --quantization exclude each other. Take --offload model.")
    run = read_run(adapter) if adapter is not None else None
    saved = run.adapter if run else None
    module = saved if isinstance(saved, SavedModule) else None
    if module is not None:
        _check_whole(module, scale, merged)
    if isinstance(saved, SavedAdapter) and offload == "sequential" and not merged:
        check_sequential_offload(saved.config)
    name = base_model or (run.base_model if run else None)
    if not name:
        raise UserError("No base model: the adapter does not name one. Say which with --base-model.")
    chosen = pick_device(device)
    if offload != "none" and chosen.type == "cpu":
        raise UserError(f"--offload {offload} keeps parts away from an accelerator, and the device is the CPU already.")
    if run is not None:
        vae = vae or run.vae
        revision = revision or (run.revision if name == run.base_model else None)
    base = load_base(name, pick_dtype(chosen, dtype), revision=revision, vae=vae, allow_pickle=allow_pickle)
    if module is not None and module.kind is UNET:
        if getattr(base.unet, "is_quantized", False):
            raise UserError(f"base_model: {base.name} holds a quantised UNet; {module.folder} is a whole one.")
        fill_module(base.unet, module.folder, UNET.what, scale)
    if isinstance(saved, SavedAdapter) and (saved.folder / BEFORE).is_dir():  # nothing merges into quantised weights
        merge_saved(base.unet, saved.folder / BEFORE)
        merge_saved(base.text_encoder, saved.folder / BEFORE, text_encoder=True)
    if quantization is not None:
        quantize(base.unet, quantization, chosen)
    if resolution is not None:
        check_resolution(resolution, base, "--resolution")
    encoder = controlnet = None
    if run is not None and module is not None and run.condition_encoder is not None:
        controlnet = load_controlnet(run.condition_encoder, base.unet, base.vae_factor)
        move(controlnet, base.unet.dtype)
    elif run is not None and run.condition_encoder is not None:
        encoder = load_condition_encoder(run.condition_encoder, base.unet)
    if isinstance(saved, SavedAdapter):
        carriers: list[torch.nn.Module] = [base.unet]
        load_adapter(base.unet, saved.folder)
        if (saved.folder / TEXT_ENCODER).is_dir():
            load_adapter(base.text_encoder, saved.folder / TEXT_ENCODER)
            carriers.append(base.text_encoder)
        for model in carriers:
            if scale != 1:
                set_scale(model, scale)
            if merged:
                merge(model)
    pipeline: Any
    if controlnet is not None:
        pipeline = controlnet_pipeline(base, controlnet)
    else:
        pipeline = base.pipeline() if encoder is None else controllable_pipeline(base, encoder)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=chosen)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    return pipeline, saved


def _check_whole(module: SavedModule, scale: float, merged: bool) -> None:
    """Refuse what only an adapter can do."""
    if merged:
        raise UserError(f"--merge: {module.folder} is a whole {module.kind.what}, not an adapter; leave it out.")
    if scale != 1 and module.kind is not UNET:
        raise UserError(f"--scale {scale:g}: {module.folder} is a {module.kind.what}; take --condition-scale.")


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    if device:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}).") from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype:
    """The dtype asked for (fp32, fp16, bf16), else fp16 on CUDA and fp32 elsewhere."""
    if dtype:
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return torch.float16 if device.type == "cuda" else torch.float32

"""A pipeline assembled from a base and what a run folder holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ether_diffusion.adapters.attach import merge, set_scale
from ether_diffusion.adapters.loading import load_adapter, merge_saved
from ether_diffusion.adapters.methods import facts_of
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.adapters.weight_sum import add_up, write_into
from ether_diffusion.errors import UserError
from ether_diffusion.hub import local_copy
from ether_diffusion.models.bases import Base, check_resolution, check_takes_hints, family_named, load_base, move
from ether_diffusion.models.condition_encoder import build_condition_encoder, load_condition_encoder
from ether_diffusion.models.controllable_pipeline import PIPELINES
from ether_diffusion.models.controlnet import CONTROLNET_PIPELINES, load_controlnet
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.quantized import check_quantization, quantize
from ether_diffusion.models.saved_modules import UNET, SavedModule

from .saved_run import SavedRun, read_run
from .summed_runs import Named, SummedRuns, read_sum

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(
    run: str | Path | SavedRun | Sequence[tuple[Named, float]] | None = None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    allow_pickle: bool = False,
    scale: float = 1.0,
    merged: bool = False,
    takes_conditions: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    resolution: int | None = None,
    quantization: str | None = None,
    offload: Literal["none", "model", "sequential"] = "none",
) -> tuple[Any, SavedAdapter | SavedModule | None]:
    """A diffusers pipeline with a saved adapter in it, or a whole module, ready to generate.

    Args:
        run: What `read_run` returned, a path for it, or a repository of the hub; None: the base alone. Several of them
            and LoRA files, each with its strength, `[("runs/a", 0.8), ("b.safetensors", 0.5)]`: their changes of the
            base's weights add up, and are merged into them.
        base_model: Hub name, folder, single file or `tiny`; default: the one the run was trained on, in its revision.
        revision: Branch, tag or commit of a hub name.
        vae: Another VAE than the base's own; default: the one that the adapter was trained with.
        allow_pickle: Let a `.ckpt` run code of its own while it is read. Never taken from a run.
        scale: The adapter's strength: 0 the base, 1 as trained; methods without a scale take these two. Of a whole
            UNet: how far its weights go from the base's to the trained ones. The base of an adapter that was trained
            after another one includes that one. A ControlNet has none. A factor of the strengths of several.
        merged: Write the adapter into the base's weights: no extra work for an image, no way back.
        takes_conditions: Without a run: a `ControllablePipeline` with an untrained encoder, whose features are zero, so
            that its images are the base's.
        device, dtype: Default: CUDA in fp16, or bf16 for bases of flow matching; else MPS or the CPU in fp32.
        resolution: Side of the images to come, checked against what the base can generate.
        quantization: Of the UNet's linear layers, as for `quantize`; None: as they were saved.
        offload: Keep parts on the CPU while they do not run: none, whole models (`model`) or layers (`sequential`), as
            in diffusers.

    Returns:
        The pipeline, without a safety checker, and the adapter or module that was read, if there is one, and not
        several. For a controllable run it is a `ControllablePipeline`, or a `ControlNetPipeline`.

    Raises:
        UserError: no run there, no such base, or parts of the two do not fit; or settings that exclude each other.
    """
    check_quantization(quantization)
    if quantization is not None and merged:
        raise UserError("--merge cannot write into quantised weights. Leave out --merge, or --quantization.")
    if quantization is not None and offload == "sequential":
        raise UserError("--offload sequential and --quantization exclude each other. Take --offload model.")
    if isinstance(run, (str, Path)):
        run = read_run(local_copy(run))
    if run is not None and not isinstance(run, SavedRun):
        run = read_sum(run)
    several = isinstance(run, SummedRuns)
    if run is not None and not several:
        _check_method(run, scale, merged, offload)
    name = base_model or (run.base_model if run else None)
    if not name:
        raise UserError("No base model: the adapter does not name one. Name it with --base-model.")
    chosen = pick_device(device)
    if offload != "none" and chosen.type == "cpu":
        raise UserError(f"--offload {offload} frees memory of an accelerator, and the device is the CPU already.")
    if run is not None:
        vae = vae or run.vae
        revision = revision or run.revision_of(name)
    computed = pick_dtype(chosen, dtype, family_named(name, revision).half)
    loaded = torch.float32 if several else computed  # sums are rounded once
    base = load_base(name, loaded, revision=revision, vae=vae, allow_pickle=allow_pickle)

    saved = run.adapter if run else None
    if isinstance(run, SummedRuns):
        parts = base.adaptable
        write_into(parts, add_up(parts, [(source, scale * s) for source, s in run.changes], low_rank=False))
        for part in base.modules.values():
            move(part, computed)
    if isinstance(saved, SavedModule) and saved.kind is UNET:
        if getattr(base.denoiser, "is_quantized", False):
            raise UserError(f"base_model: {base.name} holds a quantised UNet; {saved.folder} is a whole one.")
        fill_module(base.denoiser, saved.folder, UNET.what, scale)
    if isinstance(saved, SavedAdapter) and saved.before is not None:  # nothing merges into quantised weights
        merge_saved(base.denoiser, saved.before)
        for part, encoder in base.trainable_text_encoders.items():
            merge_saved(encoder, saved.before, text_encoder=part)
    if quantization is not None:
        quantize(base.denoiser, quantization, chosen)
    if resolution is not None:
        check_resolution(resolution, base, "--resolution")
    if isinstance(saved, SavedAdapter) and (scale != 0 or saved.has_scale):
        _put_in(base, saved, scale, merged)
    pipeline: Any = _pipeline(base, run, takes_conditions)  # after it: it wraps the UNet's first convolution
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=chosen)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    return pipeline, saved


def _check_method(run: SavedRun, scale: float, merged: bool, offload: str) -> None:
    """Refuse what the run's method cannot do."""
    saved, facts = run.adapter, run.facts
    if isinstance(saved, SavedModule):
        if merged and not facts.merges:
            raise UserError(f"--merge: {saved.folder} is a whole {saved.kind.what}, not an adapter; leave it out.")
        if scale != 1 and not facts.has_scale:
            raise UserError(f"--scale {scale:g}: {saved.folder} is a {saved.kind.what}; take --condition-scale.")
    elif saved is not None:
        check_scale(saved, scale)
        if offload == "sequential" and not merged and not facts.sequential_offload:
            raise UserError(
                f"--offload sequential: {saved.method} reads weights while they are offloaded. Take --offload model, "
                "or --merge."
            )


def check_scale(saved: SavedAdapter, scale: float) -> None:
    """Refuse a strength that an adapter's method cannot have. Raises UserError."""
    if scale not in (0, 1) and not facts_of(saved.config).has_scale:
        raise UserError(f"--scale {scale:g}: {saved.folder} is {saved.method}, which has no scale; allowed: 0 and 1.")


def _pipeline(base: Base, run: SavedRun | None, takes_conditions: bool) -> Any:
    """The base's parts in the pipeline that takes the run's conditions, if it has any."""
    if takes_conditions or (run is not None and run.condition_encoder is not None):
        check_takes_hints(base)
    if run is None and takes_conditions:
        encoder = build_condition_encoder(base.denoiser, base.vae_factor)
    elif run is None or run.condition_encoder is None:
        return base.pipeline()
    elif isinstance(run.adapter, SavedModule):
        controlnet = load_controlnet(run.condition_encoder, base.denoiser, base.vae_factor)
        move(controlnet, base.denoiser.dtype)
        return base.pipeline(CONTROLNET_PIPELINES[base.family.pipeline_class], controlnet=controlnet)
    else:
        encoder = load_condition_encoder(run.condition_encoder, base.denoiser)
    return base.pipeline(PIPELINES[base.family.pipeline_class], condition_encoder=encoder)


def _put_in(base: Base, adapter: SavedAdapter, scale: float, merged: bool) -> None:
    """Put an adapter into a base, with its parts for text encoders."""
    load_adapter(base.denoiser, adapter)
    carriers: list[torch.nn.Module] = [base.denoiser]
    for part in adapter.text_encoders:
        encoder = base.trainable_text_encoders.get(part)
        if encoder is None:
            raise UserError(f"{adapter.folder} holds {part}/, and the base {base.name} has no such text encoder.")
        load_adapter(encoder, adapter, text_encoder=part)
        carriers.append(encoder)
    for model in carriers:
        if scale != 1:
            set_scale(model, scale)
        if merged:
            merge(model)


def check_device_name(device: str | None) -> None:
    """Refuse what names no kind of device; whether there is one here is not checked. Raises UserError."""
    if device is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise UserError(f"device {device!r}: expected cpu, cuda, mps or xpu, with or without a number, as cuda:1.")


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: as `check_device_name`; or there is none here.
    """
    check_device_name(device)
    if device is not None:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}).") from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device, dtype: str | None = None, half: torch.dtype = torch.float16) -> torch.dtype:
    """The dtype asked for (fp32, fp16, bf16), else `half` on CUDA and fp32 elsewhere."""
    if dtype:
        return DTYPES[dtype]
    return half if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as `--dtype` and images' settings spell it: fp32, fp16, bf16; others as torch does."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))

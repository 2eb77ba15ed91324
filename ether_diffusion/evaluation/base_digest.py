"""The digest of the base that images were drawn with: of its weights, whatever adapter is in them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.storage import SavedAdapter
from ether_diffusion.generation import load_pipeline
from ether_diffusion.models.saved_modules import UNET, SavedModule

PARTS = ("unet", "vae", "text_encoder")


def base_of(pipeline: StableDiffusionPipeline, saved: SavedAdapter | SavedModule | None) -> StableDiffusionPipeline:
    """What a run was trained on: the pipeline that draws it, or, where its whole UNet was trained, another one."""
    if not isinstance(saved, SavedModule) or saved.kind is not UNET:
        return pipeline
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(pipeline.unet.dtype, "fp32")
    options: dict[str, Any] = {"base_model": saved.base_model, "revision": saved.revision, "vae": saved.vae}
    return load_pipeline(None, device="cpu", dtype=dtype, **options)[0]


def base_digest(pipeline: StableDiffusionPipeline) -> str:
    """SHA-256 of the weights of UNet, VAE and text encoder, by name, shape and value in fp32.

    An adapter that is attached does not count; weights that it was merged into do.
    """
    hashed = hashlib.sha256()
    for part in PARTS:
        for name, tensor in sorted(_base_weights(getattr(pipeline, part)).items()):
            value = tensor.detach().to("cpu", torch.float32).contiguous()
            hashed.update(f"{part}.{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return hashed.hexdigest()


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the names that they have without adapters."""
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            inside |= {f"{name}.{own}." for own in (*layer.adapter_layer_names, *layer.other_param_names)}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(own) for own in inside)
    }

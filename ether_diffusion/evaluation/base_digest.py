"""The digest of the base that images were generated with: of its own weights, whatever adapter is attached."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.files import Digest
from ether_diffusion.generation import load_pipeline
from ether_diffusion.models.saved_modules import UNET, SavedModule

PARTS = ("unet", "vae", "text_encoder")


def base_of(pipeline: StableDiffusionPipeline, saved: SavedAdapter | SavedModule | None) -> StableDiffusionPipeline:
    """The base that a run was trained on: the run's own pipeline, or a fresh one if the run trained the whole UNet."""
    if not isinstance(saved, SavedModule) or saved.kind is not UNET:
        return pipeline
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(pipeline.unet.dtype, "fp32")
    options: dict[str, Any] = {"base_model": saved.base_model, "revision": saved.revision, "vae": saved.vae}
    return load_pipeline(None, device="cpu", dtype=dtype, **options)[0]


def base_digest(pipeline: StableDiffusionPipeline) -> str:
    """SHA-256 of the weights of UNet, VAE and text encoder, by name, shape and value in fp32.

    An attached adapter is left out. A merged one is part of the weights.
    """
    digest = Digest()
    for part in PARTS:
        for name, tensor in sorted(_base_weights(getattr(pipeline, part)).items()):
            value = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{part}.{name}{tuple(value.shape)}", value.numpy().tobytes())
    return digest.hex()


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the names that they have without adapters."""
    adapters: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            adapters |= {f"{name}.{own}." for own in (*layer.adapter_layer_names, *layer.other_param_names)}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(prefix) for prefix in adapters)
    }

"""The base that a run trains on: loaded in the precision of training, and with the adapter, or all of it, trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ether_diffusion.adapters.attach import attach, check_layers, meta_copy
from ether_diffusion.adapters.base_digest import record_base_digest
from ether_diffusion.adapters.certify import Faults, start_fault
from ether_diffusion.adapters.loading import check_same_tensors, fill_adapter
from ether_diffusion.adapters.saved_adapter import SavedAdapter, read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import Base, check_resolution, load_base
from ether_diffusion.models.families.family import Diffusion
from ether_diffusion.models.module_files import check_module, fill_module
from ether_diffusion.models.quantized import quantize
from ether_diffusion.models.saved_modules import UNET, Kind, SavedModule, find_whole_module

from .config import TaskConfig
from .environment import precision


def load_training_base(config: TaskConfig, accelerator: Accelerator) -> Base:
    """The frozen base on the CPU, its denoiser in the precision of training, or quantised on the device.

    Raises:
        UserError: it cannot be loaded, does not fit `data.resolution`, or predicts something else than noise or
            velocity.
    """
    base = load_base_of(config, unet_dtype=precision(accelerator))
    check_method(config, base)
    if config.adapter.peft_type:
        for part in _trained_parts(config, base).values():
            record_base_digest(part)
    if config.quantization is not None:
        quantize(base.denoiser, config.quantization, accelerator.device)
    check_resolution(config.data.resolution, base, "data.resolution")
    if isinstance(base.family.objective, Diffusion) and base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"base_model: predicts {base.prediction_type!r}; supported: epsilon, v_prediction.")
    return base


def reload_in_fp32(config: TaskConfig, base: Base) -> Base:
    """The base with its UNet in fp32, to train or to copy it: loaded again if it was rounded or quantised.

    Raises:
        UserError: its UNet was saved quantised.
    """
    if config.quantization is not None or base.denoiser.dtype != torch.float32:
        base = load_base_of(config)
    if getattr(base.denoiser, "is_quantized", False):
        raise UserError(
            f"base_model: {base.name} has a quantised UNet; adapter.method: {config.adapter.method} needs its weights."
        )
    return base


def read_initial(config: TaskConfig) -> SavedAdapter | SavedModule | None:
    """The weights that `adapter.init_from` names: an adapter's, or a whole UNet's; None if it names none.

    Raises:
        UserError: there are none of this kind.
    """
    source = config.adapter.init_from
    if source is None:
        return None
    return read_module(source, UNET) if config.trains_unet else read_adapter(source)


def read_module(source: Path, kind: Kind) -> SavedModule:
    """A saved module to start from. Raises UserError: there is none of this kind."""
    found = find_whole_module(source, kind)
    if found is None:
        raise UserError(
            f"adapter.init_from: {source} holds no {kind.folder}/; expected the folder of a run of this method, or a "
            f"{kind.class_name} in diffusers' layout."
        )
    return found


def try_adapter(config: TaskConfig, base: Base, initial: SavedAdapter | SavedModule | None) -> None:
    """Attach to meta copies, so that what does not fit is refused before anything that takes long.

    Raises:
        UserError: the target matches nothing; settings or initial weights do not fit.
    """
    if isinstance(initial, SavedModule):
        check_module(base.denoiser, initial.folder, UNET.what)
    if not config.adapter.peft_type:
        return
    check_layers(base.denoiser, config.adapter)  # its own layers: a meta copy does not show torchao's quantisation
    trial = meta_copy(base.denoiser)
    attach(trial, config.adapter)
    for name, encoder in _trained_encoders(config, base).items():
        attach(meta_copy(encoder), _text_settings(config, base, name))
    if isinstance(initial, SavedAdapter):
        check_same_tensors(trial, initial)


def attach_adapter(config: TaskConfig, base: Base, initial: SavedAdapter | SavedModule | None) -> list[str]:
    """Make ready for training what the method trains of the base: an adapter, the whole UNet, or nothing.

    Args:
        initial: Weights to start from.

    Returns:
        Names of the layers with an adapter, of the denoiser and of text encoders that are trained too.
    """
    layers: list[str] = []
    if config.trains_unet:
        if isinstance(initial, SavedModule):
            fill_module(base.denoiser, initial.folder, UNET.what)
        base.denoiser.requires_grad_(True)
    elif config.adapter.peft_type:
        assert not isinstance(initial, SavedModule)
        layers += attach(base.denoiser, config.adapter, config.seed)
        if initial is not None:
            fill_adapter(base.denoiser, initial)
    for name, encoder in _trained_encoders(config, base).items():
        layers += attach(encoder, _text_settings(config, base, name), config.seed)
        if isinstance(initial, SavedAdapter):
            fill_adapter(encoder, initial.part(name))
        if config.training.gradient_checkpointing:
            encoder.gradient_checkpointing_enable()
        encoder.train()
    if config.training.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    base.denoiser.train()
    return layers


def check_start(config: TaskConfig, base: Base) -> Faults:
    """What is wrong with the initial values of the adapters in a base, as `start_fault`."""
    faults: Faults = {}
    if config.adapter.peft_type:
        faults |= start_fault(base.denoiser, config.adapter, config.seed)
    for name, encoder in _trained_encoders(config, base).items():
        faults |= start_fault(encoder, _text_settings(config, base, name), config.seed)
    return faults


def check_method(config: TaskConfig, base: Base) -> None:
    """Refuse what cannot be trained of a base's family. Raises UserError."""
    if config.trains_unet and base.family.denoiser != UNET.folder:
        raise UserError(
            f"adapter.method: {config.adapter.method} trains a whole UNet, and {base.name} is of the family "
            f"{base.family.title}, which has none; take a method that trains an adapter."
        )
    if config.adapter.text_encoder and not base.trainable_text_encoders:
        raise UserError(
            f"adapter.text_encoder: true, but {base.name} is of the family {base.family.title}, whose text encoders "
            "take no adapter; only CLIP's do."
        )


def _trained_encoders(config: TaskConfig, base: Base) -> dict[str, Any]:
    """The text encoders that are trained too."""
    return base.trainable_text_encoders if config.adapter.text_encoder else {}


def _text_settings(config: TaskConfig, base: Base, text_encoder: str) -> Any:
    """The settings of the adapter of a text encoder: its attention, as far as the features depend on it."""
    settings = config.adapter.for_text_encoder()
    target = base.family.text_target(text_encoder, base.parts[text_encoder])
    return settings if target is None else settings.model_copy(update={"target": target})


def _trained_parts(config: TaskConfig, base: Base) -> dict[str, Any]:
    return {base.family.denoiser: base.denoiser, **_trained_encoders(config, base)}


def load_base_of(config: TaskConfig, **options: Any) -> Base:
    """The base that a config names, as `load_base` gives it."""
    choices = {"revision": config.revision, "vae": config.vae, "allow_pickle": config.allow_pickle}
    return load_base(config.base_model, **choices, **options)

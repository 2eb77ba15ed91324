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
from ether_diffusion.models.module_files import check_module, fill_module
from ether_diffusion.models.quantized import quantize
from ether_diffusion.models.saved_modules import UNET, Kind, SavedModule, find_whole_module

from .config import TaskConfig
from .environment import precision


def load_training_base(config: TaskConfig, accelerator: Accelerator) -> Base:
    """The frozen base on the CPU, its UNet in the precision of training, or quantised on the device.

    Raises:
        UserError: it cannot be loaded, does not fit `data.resolution`, or predicts something else than noise or
            velocity.
    """
    base = load_base_of(config, unet_dtype=precision(accelerator))
    if config.adapter.peft_type:
        record_base_digest(base.unet)
        if config.adapter.text_encoder:
            record_base_digest(base.text_encoder)
    if config.quantization is not None:
        quantize(base.unet, config.quantization, accelerator.device)
    check_resolution(config.data.resolution, base, "data.resolution")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"base_model: predicts {base.prediction_type!r}; supported: epsilon, v_prediction.")
    return base


def reload_in_fp32(config: TaskConfig, base: Base) -> Base:
    """The base with its UNet in fp32, to train or to copy it: loaded again if it was rounded or quantised.

    Raises:
        UserError: its UNet was saved quantised.
    """
    if config.quantization is not None or base.unet.dtype != torch.float32:
        base = load_base_of(config)
    if getattr(base.unet, "is_quantized", False):
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
        check_module(base.unet, initial.folder, UNET.what)
    if not config.adapter.peft_type:
        return
    check_layers(base.unet, config.adapter)  # the UNet's own layers: a meta copy does not show torchao's quantisation
    trial = meta_copy(base.unet)
    attach(trial, config.adapter)
    if config.adapter.text_encoder:
        attach(meta_copy(base.text_encoder), config.adapter.for_text_encoder())
    if isinstance(initial, SavedAdapter):
        check_same_tensors(trial, initial)


def attach_adapter(config: TaskConfig, base: Base, initial: SavedAdapter | SavedModule | None) -> list[str]:
    """Make ready for training what the method trains of the base: an adapter, the whole UNet, or nothing.

    Args:
        initial: Weights to start from.

    Returns:
        Names of the layers with an adapter, of the UNet and, if it is trained too, of the text encoder.
    """
    layers: list[str] = []
    if config.trains_unet:
        if isinstance(initial, SavedModule):
            fill_module(base.unet, initial.folder, UNET.what)
        base.unet.requires_grad_(True)
    elif config.adapter.peft_type:
        assert not isinstance(initial, SavedModule)
        layers += attach(base.unet, config.adapter, config.seed)
        if initial is not None:
            fill_adapter(base.unet, initial)
    if config.adapter.text_encoder:
        layers += attach(base.text_encoder, config.adapter.for_text_encoder(), config.seed)
        if isinstance(initial, SavedAdapter):
            fill_adapter(base.text_encoder, initial.text_part)
        if config.training.gradient_checkpointing:
            base.text_encoder.gradient_checkpointing_enable()
        base.text_encoder.train()
    if config.training.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()
    return layers


def check_start(config: TaskConfig, base: Base) -> Faults:
    """What is wrong with the initial values of the adapters in a base, as `start_fault`."""
    faults: Faults = {}
    if config.adapter.peft_type:
        faults |= start_fault(base.unet, config.adapter, config.seed)
    if config.adapter.text_encoder:
        faults |= start_fault(base.text_encoder, config.adapter.for_text_encoder(), config.seed)
    return faults


def load_base_of(config: TaskConfig, **options: Any) -> Base:
    """The base that a config names, as `load_base` gives it."""
    choices = {"revision": config.revision, "vae": config.vae, "allow_pickle": config.allow_pickle}
    return load_base(config.base_model, **choices, **options)

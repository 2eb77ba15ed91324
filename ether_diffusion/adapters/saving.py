"""Adapters written to disk: PEFT folders with a model card, whole or not at all."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn

from ether_diffusion.errors import Notice, UserError
from ether_diffusion.ether.frozen import is_on_disk
from ether_diffusion.files import whole_folder
from ether_diffusion.model_card import carrier_of, model_card, pipeline_code
from ether_diffusion.weight_files import unwrapped

from .attach import check_not_nested
from .base_digest import base_digest, dtype_of
from .certificate import CERTIFICATE, Certificate
from .certify import Watch, certify, has_effect
from .methods import facts_of, method_title
from .saved_adapter import (
    BEFORE,
    TEXT_ENCODER,
    TEXT_ENCODERS,
    VAE,
    WEIGHTS,
    SavedAdapter,
    previous_adapter,
    read_adapter,
    with_prefix,
)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str,
    revision: str | None = None,
    vae: str | None = None,
    name: str = "default",
    notes: dict[str, Any] | None = None,
    text_encoder: nn.Module | Mapping[str, nn.Module] | None = None,
) -> Path:
    """Write an adapter as a PEFT folder, read it back and compare. An older folder is replaced only by a whole new one.

    An adapter that was merged into the model before is written to the subfolder `before`, byte for byte. An adapter
    that changes nothing measurable is written and marked, and a `Notice` says so.

    Args:
        model: The UNet, or any other module, that carries the adapter.
        folder: Where to. Missing folders above it are made.
        base_model: Name of the base, for the adapter's config and card.
        revision: Of the base, where it is a hub name.
        vae: The VAE that takes the place of the base's own.
        name: The adapter's name in the model.
        notes: Facts for the model card, such as the instance prompt and the number of steps.
        text_encoder: A text encoder with an adapter, which is written to the subfolder `text_encoder`; or several, by
            the names of their subfolders: `{"text_encoder": …, "text_encoder_2": …}`.

    Returns:
        The folder.

    Raises:
        UserError: the model has no adapter of that name, an adapter lies inside another one's layer, or group
            offloading keeps parts of the model on the disk; nothing is written, and an older folder stays.
        OSError: the files cannot be written, or what was read back is not what was written.
    """
    origin: dict[str, Any] = {"base_model": base_model, "revision": revision, "vae": vae, "notes": notes}
    text_encoders = {TEXT_ENCODER: text_encoder} if isinstance(text_encoder, nn.Module) else dict(text_encoder or {})
    if unknown := [part for part in text_encoders if part not in TEXT_ENCODERS]:
        raise UserError(f"save_adapter: text_encoder {unknown[0]!r}; expected one of {', '.join(TEXT_ENCODERS)}.")
    certificate = write_adapter(model, folder, **origin, name=name, text_encoders=text_encoders)
    if certificate.faults:
        warnings.warn(f"{folder}: written, but not certified: {certificate.line}", Notice, stacklevel=2)
    return Path(folder)


def write_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str,
    revision: str | None = None,
    vae: str | None = None,
    name: str = "default",
    notes: dict[str, Any] | None = None,
    text_encoders: Mapping[str, nn.Module] = MappingProxyType({}),
    watch: Watch | None = None,
) -> Certificate:
    """As `save_adapter`; returns what was checked instead of warning of it.

    Args:
        watch: What was seen of the run that trained the adapter.
    """
    folder = Path(folder)
    notes = {**({"VAE": f"`{vae}`"} if vae else {}), **(notes or {})}
    with unwrapped(model) as bare:
        before = previous_adapter(bare)
    merged = ["/".join([BEFORE] * depth) for depth in range(len(before.phases) if before else 0, 0, -1)]
    with whole_folder(folder) as partial:
        state = _write(model, partial, name, base_model, revision, notes, merged)
        if vae is not None:
            (partial / VAE).write_text(json.dumps({"vae": vae}), encoding="utf-8")
        texts = {
            part: _write(encoder, partial / part, name, base_model, revision, notes, [], part)
            for part, encoder in text_encoders.items()
        }
        if before is not None:
            before.write(partial / BEFORE)
        saved = read_adapter(partial)
        same = [_same(saved, state), *(_same(saved.text_encoders.get(part), own) for part, own in texts.items())]
        if not all(same) or saved.text_encoders.keys() != texts.keys():
            raise OSError(f"{folder}: the adapter read back is not the one written. Is the disk full or failing?")
        certificate = _certificate(model, text_encoders, saved, name, base_model, watch)
        (partial / CERTIFICATE).write_text(certificate.to_text(), encoding="utf-8")
    return certificate


def _certificate(
    model: nn.Module,
    text_encoders: Mapping[str, nn.Module],
    saved: SavedAdapter,
    name: str,
    base_model: str,
    watch: Watch | None,
) -> Certificate:
    """Check what was written, as it was read back."""
    faults, measured = (watch.faults(), watch.measured()) if watch else ({}, {})
    base, changes, works = {"name": base_model}, {}, False
    texts = [(encoder, saved.text_encoders[own], f"{own}.") for own, encoder in text_encoders.items()]
    for carrier, part, what in [(model, saved, ""), *texts]:
        with unwrapped(carrier) as bare:
            found, changed = certify(bare, part, name)
            faults = {**found, **faults}
            changes |= {what + path: change for path, change in changed.items()}
            works = works or bool(found) or has_effect(bare, part, changed, name)
            digest = base_digest(bare)
            if digest is not None:
                base |= {f"{what.replace('.', '_')}digest": digest, f"{what.replace('.', '_')}dtype": dtype_of(bare)}
    if not works and not {"unmoved", "underflow"} & faults.keys():
        moved = watch is not None and not faults
        faults["underflow" if moved else "effect"] = "the adapter changes nothing measurable"
    return Certificate(faults, {**measured, "changes": changes}, base, saved.weights_digest)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by PEFT's file keys, including those that accelerate has offloaded.

    Raises:
        UserError: as `save_adapter`.
    """
    with unwrapped(model) as bare:
        known: dict[str, PeftConfig] = getattr(bare, "peft_config", {})
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise UserError(f"{type(bare).__name__}: no adapter {name!r} to save; there is: {there}.")
        on_disk = next((key for key, module in bare.named_modules() if is_on_disk(module)), None)
        if on_disk is not None:
            raise UserError(
                f"{on_disk or type(bare).__name__} is offloaded to the disk by diffusers' group offloading, and its "
                "weight is not here. Save before offloading, or group-offload without offload_to_disk_path."
            )
        check_not_nested(bare)
        method = facts_of(known[name])
        method.project(bare, name)
        everything = {**_tensors_here(bare, name), **method.shared_tensors(bare, name)}
        state = get_peft_model_state_dict(bare, everything, adapter_name=name, save_embedding_layers=False)
        found = {with_prefix(key): tensor.detach().to("cpu").contiguous().clone() for key, tensor in state.items()}
    wrapped = next((key for key in found if any(part.startswith("_") for part in key.split("."))), None)
    if wrapped is not None:
        raise UserError(f"{wrapped} lies in a wrapper of the model, and would fit no other; save the model within it.")
    return found


def _write(
    model: nn.Module,
    folder: Path,
    name: str,
    base_model: str,
    revision: str | None,
    notes: dict[str, Any],
    merged: list[str],
    text_encoder: str = TEXT_ENCODER,
) -> dict[str, Tensor]:
    """Write one adapter's weights, config and card, and return its tensors.

    Args:
        merged: Paths in its folder of the adapters before it.
        text_encoder: The name of the model, if it is a text encoder.
    """
    with unwrapped(model) as bare:
        state, is_text = adapter_state(bare, name), "Text" in type(bare).__name__
        configs: Any = bare.peft_config
        config: PeftConfig = copy.deepcopy(configs[name])
    config.base_model_name_or_path, config.revision = base_model, revision
    config.inference_mode = True
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key, None), (set, tuple, list)):
            setattr(config, key, sorted(getattr(config, key)))  # sets have no order: equal runs give equal files
    config.save_pretrained(str(folder))
    # One entry of metadata only: safetensors writes several in an order of its own, and equal adapters would differ.
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    part, kind = carrier_of(state) if not is_text else (f"pipeline.{text_encoder}", "StableDiffusionPipeline")
    (folder / "README.md").write_text(_card(config, state, part, kind, notes, merged), encoding="utf-8")
    return state


def _card(
    config: PeftConfig, state: dict[str, Tensor], part: str, kind: str, notes: dict[str, Any], before: list[str]
) -> str:
    """The README.md of a PEFT folder: what the adapter is, and the lines that load it with plain diffusers and PEFT.

    Args:
        part: The part of a pipeline that carries it: `pipeline.unet`.
        kind: The pipeline's class.
        before: Paths in this folder of the adapters that are merged into the base first, in their order.
    """
    base, facts = config.base_model_name_or_path or "", facts_of(config)
    rows = card_rows(config, sum(tensor.numel() for key, tensor in state.items() if facts.is_trained(key)))
    if before:
        rows["after"] = f"`{before[-1]}/`, which is merged into the base"
    load = f"{part} = PeftModel.from_pretrained({part}, "
    # PEFT knows its own methods, and raises a KeyError for others.
    needed = "" if isinstance(config.peft_type, PeftType) else "import ether_diffusion  # makes PEFT know the method\n"
    merged = "".join(f'{load}"path/to/this/folder/{folder}").merge_and_unload()\n' for folder in before)
    code = f'{needed}{pipeline_code(base, kind)}\nfrom peft import PeftModel\n{merged}{load}"path/to/this/folder")'
    published = f" Method: [{facts.title}]({facts.paper})." if facts.paper else ""
    return model_card(f"{method_title(config)} adapter", base, "peft", {**rows, **notes}, code, published)


def card_rows(config: PeftConfig, parameters: int) -> dict[str, str]:
    """The rows of an adapter's card: base, method, trained parameters, and the settings that are not empty."""
    hidden = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"}
    settings = {key: value for key, value in sorted(config.to_dict().items()) if value not in (None, {}, [], "")}
    rows = {"base model": f"`{config.base_model_name_or_path or ''}`", "method": method_title(config)}
    rows["parameters"] = f"{parameters:,}"
    return rows | {key: f"`{value}`" for key, value in settings.items() if key not in hidden}


def _same(saved: SavedAdapter | None, state: dict[str, Tensor]) -> bool:
    if saved is None or saved.tensors.keys() != state.keys():
        return False
    return all(torch.equal(saved.tensors[key], state[key]) for key in state)


def _tensors_here(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The state of a model, with an adapter's tensors in the place of accelerate's placeholders."""
    configs: Any = model.peft_config
    parts = PEFT_TYPE_TO_PREFIX_MAPPING[configs[name].peft_type], f"modules_to_save.{name}"
    state = model.state_dict()
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        away = [key for key, tensor in tensors.items() if tensor is not None and tensor.is_meta]
        if away and any(part in path for part in parts):
            with align_module_device(module, torch.device("cpu")):
                here = {f"{path}.{key}": getattr(module, key).detach().clone() for key in away}
            state |= {key: tensor for key, tensor in here.items() if key in state}
    return state

"""Adapters on disk: PEFT folders with a model card, written whole or not at all, loaded strictly."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import is_on_disk

from .attach import find_adapter
from .methods import method_title
from .model_card import model_card
from .peft_layers import is_frozen, project, shared_state
from .phases import BEFORE, CONFIG, TEXT_ENCODER, WEIGHTS, previous_adapter, weights_digest

VAE = "vae.json"  # there where another VAE than the base's own was trained with
# PeftModel's prefix of its keys. Without it PeftModel.from_pretrained would load nothing, with a mere warning.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class SavedAdapter:
    """What a PEFT folder says of itself."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]

    @property
    def method(self) -> str:
        before = f"{self.before.method} + " if self.before else ""
        return before + method_title(self.config)

    @cached_property
    def before(self) -> SavedAdapter | None:
        """The adapter that was merged into the base before this one was trained."""
        return read_adapter(self.folder / BEFORE) if (self.folder / BEFORE).is_dir() else None

    @property
    def base_model(self) -> str | None:
        return self.config.base_model_name_or_path

    @property
    def revision(self) -> str | None:
        """The base's branch, tag or commit."""
        return self.config.revision

    @property
    def vae(self) -> str | None:
        """The VAE that took the place of the base's own."""
        path = self.folder / VAE
        return json.loads(path.read_text(encoding="utf-8"))["vae"] if path.is_file() else None

    @property
    def parameters(self) -> int:
        """Trained numbers, without the frozen ones that some methods save beside them; of an adapter before, too."""
        return self.own_parameters + (self.before.parameters if self.before else 0)

    @property
    def own_parameters(self) -> int:
        """The same without an adapter before."""
        return sum(tensor.numel() for key, tensor in self.tensors.items() if not is_frozen(key))

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, of the text encoder's and of an adapter before too, where there are any."""
        return weights_digest(self.folder)


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by PEFT's file keys. Also those that accelerate has offloaded.

    Raises:
        UserError: the model has no adapter of that name; or diffusers' group offloading keeps parts of the model on the
            disk, where nothing but they finds them.
    """
    known = list(getattr(model, "peft_config", {}))
    if name not in known:
        there = ", ".join(map(repr, known)) or "none"
        raise UserError(f"{type(model).__name__}: no adapter {name!r} to save; there is: {there}.")
    on_disk = next((key for key, module in model.named_modules() if is_on_disk(module)), None)
    if on_disk is not None:
        raise UserError(
            f"{on_disk or type(model).__name__} is offloaded to the disk by diffusers' group offloading, and what is "
            "left of it here is no weight. Save before offloading, or group-offload without offload_to_disk_path."
        )
    project(model, name)
    here = _tensors_here(model, name)
    state = get_peft_model_state_dict(
        model,
        state_dict={**(model.state_dict() if here is None else here), **shared_state(model, name)},
        adapter_name=name,
        save_embedding_layers=False,
    )
    return {with_prefix(key): tensor.detach().to("cpu").contiguous().clone() for key, tensor in state.items()}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str,
    revision: str | None = None,
    vae: str | None = None,
    name: str = "default",
    notes: dict[str, Any] | None = None,
    text_encoder: nn.Module | None = None,
) -> Path:
    """Write an adapter as a PEFT folder, read it back and compare. An older folder is replaced only by a whole new one.

    Args:
        model: The UNet, or any other module, that carries the adapter.
        folder: Where to. Missing folders above it are made.
        base_model: Name of the base, for the adapter's config and card.
        revision: Of the base, where it is a hub name.
        vae: The VAE that takes the place of the base's own.
        name: The adapter's name in the model.
        notes: Facts for the model card, such as the instance prompt and the number of steps.
        text_encoder: A text encoder with an adapter of its own, which goes into the subfolder `text_encoder`.

    An adapter that was merged into the UNet before goes into the subfolder `before`, as it was.

    Returns:
        The folder.

    Raises:
        UserError: the model has no adapter of that name, or group offloading keeps parts of the model on the disk;
            nothing is written, and an older folder stays.
        OSError: what was read back is not what was written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    notes = {**({"VAE": f"`{vae}`"} if vae else {}), **(notes or {})}
    _write(model, partial, base_model, revision, name, notes)
    if vae is not None:
        (partial / VAE).write_text(json.dumps({"vae": vae}), encoding="utf-8")
    if text_encoder is not None:
        _write(text_encoder, partial / TEXT_ENCODER, base_model, revision, name, notes)
    before = previous_adapter(model)
    if before is not None:
        before.write(partial / BEFORE)
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.replace(previous)
    partial.replace(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def _tensors_here(model: nn.Module, name: str) -> dict[str, Tensor] | None:
    """An adapter's state with real tensors in the place of accelerate's placeholders; None: all are real already."""
    configs: Any = model.peft_config
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[configs[name].peft_type]
    modules = [(path, module) for path, module in model.named_modules() if prefix in path]
    if not any(parameter.is_meta for _, module in modules for parameter in module.parameters()):
        return None
    state = {}
    for path, module in modules:
        with align_module_device(module, torch.device("cpu")):
            own = {**module._parameters, **module._buffers}  # what is saved: not children's, nor what is made anew
            kept = {key: own[key] for key in own.keys() - module._non_persistent_buffers_set}
            state |= {f"{path}.{key}": tensor.detach().clone() for key, tensor in kept.items() if tensor is not None}
    return state


def _write(
    model: nn.Module, folder: Path, base_model: str, revision: str | None, name: str, notes: dict[str, Any]
) -> None:
    folder.mkdir()
    state = adapter_state(model, name)
    configs: Any = model.peft_config
    config: PeftConfig = copy.deepcopy(configs[name])
    config.base_model_name_or_path, config.revision = base_model, revision
    config.inference_mode = True
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key, None), (set, tuple, list)):
            setattr(config, key, sorted(getattr(config, key)))  # sets have no order: equal runs give equal files
    # One entry of metadata only: safetensors writes several in an order of its own, and equal adapters would differ.
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    before = previous_adapter(model) if folder.name != TEXT_ENCODER else None
    card = model_card(config, base_model, state, type(model).__name__, notes, before.folders if before else [])
    (folder / "README.md").write_text(card, encoding="utf-8")
    saved = read_adapter(folder)
    if saved.tensors.keys() != state.keys() or any(not torch.equal(saved.tensors[key], state[key]) for key in state):
        raise OSError(f"{folder}: the adapter read back is not the one that was written. Is the disk full or failing?")


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read a saved adapter without a model.

    Args:
        path: A run folder, a checkpoint folder, or a PEFT folder.

    Raises:
        UserError: no adapter there, unreadable files, an unknown method, or numbers that are not finite.
    """
    folder = find_adapter(path)
    config = _read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise UserError(f"{folder}: the adapter's {WEIGHTS} is missing.") from error
    except SafetensorError as error:
        raise UserError(f"{folder}: the adapter cannot be read ({error}).") from error
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{folder}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, e.g. {bad[0]}.")
    return SavedAdapter(folder, config, tensors)


def _read_config(folder: Path) -> PeftConfig:
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise UserError(f"{path}: expected a JSON object, got {raw!r:.60}.")
        method = raw.get("peft_type")
        if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
            known = ", ".join(sorted(str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING))
            raise UserError(f"{path}: unknown method {method!r}; known: {known}.")
        return PeftConfig.from_pretrained(str(folder))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:  # of JSON, of UTF-8, or of PEFT's own checks
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error


def with_prefix(key: str) -> str:
    """A key of an adapter's tensor as PEFT files have it."""
    return key if key.startswith("base_model.") else PREFIX + key

"""Modules that are trained whole, a UNet or a ControlNet: saved in diffusers' layout, with their base recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from ether_diffusion.input_files import read_object
from ether_diffusion.model_card import model_card, pipeline_code

from .module_files import find_module, module_digest, number_of_saved, save_module

FACTS = "trained.json"


@dataclass(frozen=True)
class Kind:
    """A kind of module that is trained whole."""

    folder: str
    """Its name in a run folder."""
    class_name: str
    title: str
    """The method's name in messages and model cards."""
    what: str
    """The module's name in messages and model cards."""


UNET = Kind("unet", "UNet2DConditionModel", "full fine-tuning", "UNet")
CONTROLNET = Kind("controlnet", "ControlNetModel", "ControlNet", "ControlNet")


@dataclass(frozen=True)
class SavedModule:
    """The folder of a module that was trained whole, and what it records: nothing, if another program saved it."""

    folder: Path
    kind: Kind
    base_model: str | None = None
    revision: str | None = None
    """The base's branch, tag or commit."""
    vae: str | None = None
    """The VAE that was used instead of the base's own."""

    @property
    def method(self) -> str:
        return self.kind.title

    @cached_property
    def parameters(self) -> int:
        return number_of_saved(self.folder, self.kind.what)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return module_digest(self.folder)

    @property
    def weights_digest(self) -> str:
        """The same, by the name that it has for an adapter, whose digest covers its settings too."""
        return self.digest


def save_whole_module(
    module: ModelMixin,
    folder: str | Path,
    kind: Kind,
    *,
    base_model: str,
    revision: str | None = None,
    vae: str | None = None,
    notes: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a module in diffusers' layout, with a model card and the record of its base next to the weights.

    Args:
        base_model, revision, vae: What the module was trained with, as for `load_base`.
        notes: Facts for the card, such as the instance prompt and the number of steps.
        texts: Other files of the folder, by name.

    Raises:
        OSError: as `save_module`.
    """
    facts = {"base_model": base_model, "revision": revision, "vae": vae, "method": kind.title}
    notes = {**({"VAE": f"`{vae}`"} if vae else {}), **(notes or {})}
    numbers = sum(parameter.numel() for parameter in module.parameters())
    own = {FACTS: json.dumps(facts, indent=1) + "\n", "README.md": _card(kind, base_model, numbers, notes)}
    return save_module(module, folder, {**own, **(texts or {})})


def find_whole_module(path: str | Path, *kinds: Kind) -> SavedModule | None:
    """The first of these kinds that `find_module` finds, if any. Raises UserError where its record cannot be read."""
    for kind in kinds:
        folder = find_module(path, kind.folder, kind.class_name)
        if folder is not None:
            path = folder / FACTS
            facts = read_object(path) if path.exists() else {}
            return SavedModule(folder, kind, **{name: facts.get(name) for name in ("base_model", "revision", "vae")})
    return None


def _card(kind: Kind, base: str, numbers: int, notes: Mapping[str, Any]) -> str:
    pipeline = "StableDiffusionPipeline" if kind is UNET else "StableDiffusionControlNetPipeline"
    module = f'{kind.class_name}.from_pretrained("path/to/this/folder")'
    code = f"from diffusers import {kind.class_name}\n{pipeline_code(base, pipeline, **{kind.folder: module})}"
    rows = {"base model": f"`{base}`", "method": kind.title, "parameters": f"{numbers:,}", **notes}
    return model_card(f"{kind.title}: a {kind.what}", base, "diffusers", rows, code)

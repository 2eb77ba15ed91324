"""Modules that are trained whole, a UNet or a ControlNet: saved in diffusers' layout, with their base recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from ether_diffusion.errors import UserError
from ether_diffusion.version import __version__

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
    """The folder of a module that was trained whole, and what it records."""

    folder: Path
    kind: Kind
    facts: dict[str, Any] = field(default_factory=dict)
    """Base model, revision and VAE; empty for a module that was saved by another program."""

    @property
    def method(self) -> str:
        return self.kind.title

    @property
    def base_model(self) -> str | None:
        return self.facts.get("base_model")

    @property
    def revision(self) -> str | None:
        """The base's branch, tag or commit."""
        return self.facts.get("revision")

    @property
    def vae(self) -> str | None:
        """The VAE that was used instead of the base's own."""
        return self.facts.get("vae")

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
) -> Path:
    """Write a module in diffusers' layout, with a model card and the record of its base next to the weights.

    Args:
        base_model, revision, vae: What the module was trained with, as for `load_base`.
        notes: Facts for the card, such as the instance prompt and the number of steps.

    Raises:
        OSError: as `save_module`.
    """
    facts = {"base_model": base_model, "revision": revision, "vae": vae, "method": kind.title}
    notes = {**({"VAE": f"`{vae}`"} if vae else {}), **(notes or {})}
    numbers = sum(parameter.numel() for parameter in module.parameters())
    texts = {FACTS: json.dumps(facts, indent=1) + "\n", "README.md": _card(kind, base_model, numbers, notes)}
    return save_module(module, folder, texts)


def find_whole_module(path: str | Path, *kinds: Kind) -> SavedModule | None:
    """The first of these kinds that is found, as by `find_module`.

    Returns:
        None if there is none.

    Raises:
        UserError: its record cannot be read.
    """
    for kind in kinds:
        folder = find_module(path, kind.folder, kind.class_name)
        if folder is not None:
            return SavedModule(folder, kind, _read_facts(folder / FACTS))
    return None


def _read_facts(path: Path) -> dict[str, Any]:
    """The record of a module; empty for one that another program saved."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path}: cannot be read (expected values by name).")
    return facts


def _card(kind: Kind, base: str, numbers: int, notes: Mapping[str, Any]) -> str:
    rows = {"base model": f"`{base}`", "method": kind.title, "parameters": f"{numbers:,}"}
    rows |= {key.replace("_", " "): str(value) for key, value in notes.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    module = f'{kind.class_name}.from_pretrained("path/to/this/folder")'
    pipeline = "StableDiffusionPipeline" if kind is UNET else "StableDiffusionControlNetPipeline"
    if base == "tiny":
        example = f"""from ether_diffusion.models.bases import load_base
parts = {{**load_base("tiny").pipeline().components, "{kind.folder}": {module}}}
pipeline = {pipeline}(**parts, requires_safety_checker=False)"""
    else:
        load = "from_single_file" if base.endswith((".safetensors", ".ckpt")) else "from_pretrained"
        example = f'pipeline = {pipeline}.{load}("{base}", {kind.folder}={module})'
    return f"""---
base_model: {base}
library_name: diffusers
tags: [diffusers, text-to-image, stable-diffusion]
---

# {kind.title}: a {kind.what} for {base}

| | |
|---|---|
{table}

```python
from diffusers import {kind.class_name}, {pipeline}
{example}
```

Made with ether_diffusion {__version__}.
"""

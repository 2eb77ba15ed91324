"""A run folder, read once: its adapter, its condition encoder or its whole module; and the run's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ether_diffusion.adapters.methods import METHODS, MethodSettings, facts_of, folder_of
from ether_diffusion.adapters.saved_adapter import CONFIG as ADAPTER_CONFIG
from ether_diffusion.adapters.saved_adapter import SavedAdapter, find_adapter, read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, list_checkpoints
from ether_diffusion.input_files import read_text
from ether_diffusion.models.condition_encoder import find_condition_encoder
from ether_diffusion.models.saved_modules import CONTROLNET, UNET, SavedModule, find_whole_module

CONFIG = "config.yaml"
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("", "adapter", "data", "training", "validation"), (dict, "settings by name")),
    **dict.fromkeys(
        ("base_model", "revision", "vae", "adapter.method", "data.instance_dir", "data.instance_prompt",
         "data.identifier", "data.class_name", "data.dataset_dir", "data.split", "data.condition",
         "data.caption_template", "data.cache_dir", "validation.split", "validation.captions"),
        (str, "text"),
    ),
    "data.captions": ((str, bool), "text, true or false"),
    "data.more_subjects": (list, "a list"),
}  # fmt: skip
"""What a run's config must hold, where it holds it, for the commands that read runs; sections come first."""


@dataclass(frozen=True)
class SavedRun:
    """A run folder, one of its checkpoints, or a folder of either's parts."""

    path: Path
    adapter: SavedAdapter | SavedModule | None
    """Or the whole UNet or ControlNet that was trained in its place. None: the condition encoder alone was trained."""
    condition_encoder: Path | None
    """The folder of what reads a controllable run's conditions: its encoder, or its ControlNet."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's, as plain values; empty where the parts are in no run folder."""

    def __repr__(self) -> str:
        return f"SavedRun({str(self.path)!r}: {self.adapter.method if self.adapter else 'the condition encoder alone'})"

    @property
    def trained(self) -> SavedAdapter | SavedModule:
        """The adapter, or the module in its place.

        Raises:
            UserError: there is none.
        """
        if self.adapter is None:
            raise UserError(f"{self.path} trained its condition encoder alone; expected a run with an adapter.")
        return self.adapter

    @property
    def facts(self) -> type[MethodSettings]:
        """The facts of the method that trained it: whether it has a scale, merges, …"""
        if isinstance(self.adapter, SavedAdapter):
            return facts_of(self.adapter.config)
        folder = self.adapter.kind.folder if self.adapter else ""
        return next(method for method in METHODS.values() if not method.peft_type and method.folder == folder)

    @property
    def runs(self) -> list[SavedRun]:
        """The runs that this one consists of."""
        return [self]

    @property
    def base_model(self) -> str | None:
        return (self.adapter.base_model if self.adapter else None) or self.config.get("base_model")

    @property
    def revision(self) -> str | None:
        """The base's branch, tag or commit."""
        return self.adapter.revision if self.adapter else self.config.get("revision")

    def revision_of(self, base: str | None) -> str | None:
        """The revision to load a base in, if it is the run's own."""
        return self.revision if base == self.base_model else None

    @property
    def vae(self) -> str | None:
        """The VAE that took the place of the base's own."""
        return self.adapter.vae if self.adapter else self.config.get("vae")


def read_run(path: str | Path) -> SavedRun:
    """Read a run's adapter, and find its condition encoder, or the whole module that it trained in their place.

    Args:
        path: A run folder, a checkpoint folder, or the folder of an adapter, of a condition encoder, or of a UNet or
            ControlNet in diffusers' layout.

    Raises:
        UserError: as `read_adapter`, unless the run trained no adapter.
    """
    path = Path(path)
    module = find_whole_module(path, UNET, CONTROLNET) if not (path / ADAPTER_CONFIG).is_file() else None
    if module is not None:
        reads_conditions = module.folder if module.kind is CONTROLNET else None
        return SavedRun(path, module, reads_conditions, run_config_of(module.folder) or {})
    encoder = find_condition_encoder(path)
    if encoder is None:
        adapter = read_adapter(path)
        return SavedRun(path, adapter, None, run_config_of(adapter.folder) or {})
    config = run_config_of(encoder) or {}
    folder = find_adapter(path) if (path / ADAPTER_CONFIG).is_file() else encoder.parent / "adapter"
    method = (config.get("adapter") or {}).get("method")
    if not folder.is_dir() and (method is None or not folder_of(method)):
        return SavedRun(path, None, encoder, config)
    return SavedRun(path, read_adapter(folder), encoder, config)


def run_config_of(part: Path) -> dict[str, Any] | None:
    """The config of the run that a part of it belongs to, as a plain dictionary; None if it belongs to none.

    Raises:
        UserError: as `read_config`.
    """
    # RUN/adapter, RUN/checkpoints/step-000200/adapter; a repository of the hub has both at its top.
    folders = [part.resolve(), *part.resolve().parents][:4]
    return next((read_config(folder) for folder in folders if (folder / CONFIG).is_file()), None)


def read_config(run: Path) -> dict[str, Any]:
    """The config of a run folder, as a plain dictionary; an empty one if there is no file.

    Raises:
        UserError: it cannot be read, is not YAML, or a setting that is used here is of the wrong kind.
    """
    path = run / CONFIG
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error
    for key, (kind, expected) in _KINDS.items():
        value: Any = config
        for part in filter(None, key.split(".")):
            value = value.get(part) if value is not None else None
        if not isinstance(value, kind) and (value is not None or not key):
            what = f"{key}: " * bool(key)
            raise UserError(f"{path}: not the config of a run: {what}{value!r:.80}; expected {expected}.")
    return config


def checkpoints_of(run: str | Path) -> dict[str, Path]:
    """The checkpoint folders of a run that hold weights, by name, in the order of their steps.

    Raises:
        UserError: there is none.
    """
    folders = list_checkpoints(Path(run) / CHECKPOINTS)
    found = {folder.name: folder for folder in folders if any(folder.glob("*/*.safetensors"))}
    if not found:
        raise UserError(f"{run}: no weights in {CHECKPOINTS}/step-…; expected a run folder.")
    return found

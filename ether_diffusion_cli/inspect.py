"""`ether-diffusion inspect`: what a saved adapter or condition encoder is, without its base."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from .arguments import Commands, add_run

if TYPE_CHECKING:
    from pathlib import Path

    from ether_diffusion.generation import SavedRun

HIDDEN = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_weights",
    "peft_type",
    "peft_version",
    "task_type",
)
"""Settings in PEFT's configs that say nothing about the adapter, or stand in other rows."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "inspect",
        run,
        "describe a saved adapter",
        "Describe a saved adapter: method, base model, parameters, settings and digest. Needs no base.",
    )
    add_run(parser, "a run folder, a checkpoint folder, or a PEFT folder")


def run(arguments: Namespace) -> None:
    """Print the description. Raises UserError as `read_run`."""
    from ether_diffusion.generation import read_run

    saved = read_run(arguments.adapter)
    rows = _of_adapter(saved)
    if saved.condition_encoder is not None:
        rows |= {} if rows else {"base model": saved.base_model}
        rows |= _of_encoder(saved.condition_encoder)
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


def _of_adapter(run: SavedRun) -> dict[str, Any]:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter

    saved = run.adapter
    if saved is None:
        return {}
    tensors = f" in {len(saved.tensors)} tensors" if isinstance(saved, SavedAdapter) else ""
    rows: dict[str, Any] = {
        "folder": saved.folder,
        "method": saved.method,
        "base model": saved.base_model,
        "parameters": f"{saved.parameters:,}{tensors}",
        "sha256": saved.digest,
    }
    if isinstance(saved, SavedAdapter):
        if saved.before is not None:
            rows["before"] = f"{saved.before.folder}: {saved.before.method}, {saved.before.parameters:,} parameters"
        for key, value in sorted(saved.config.to_dict().items()):
            if key not in HIDDEN and value not in (None, {}, [], ""):
                rows[key] = ", ".join(sorted(value)) if isinstance(value, (set, list, tuple)) else value
    return rows


def _of_encoder(folder: Path) -> dict[str, Any]:
    from ether_diffusion.data.condition_kind import read_condition_kind
    from ether_diffusion.models.module_files import module_digest

    kind = read_condition_kind(folder)
    conditions = "not recorded"
    if kind is not None:
        conditions = f"{kind.kind} of {len(kind.names)} classes" if kind.names else kind.kind
    return {
        "condition encoder": folder,
        "its conditions": conditions,
        "its sha256": module_digest(folder),
    }

"""`ether-diffusion inspect`: what a saved adapter, a condition encoder, or a file of another program is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Commands, add_run

if TYPE_CHECKING:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter
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
        "describe a saved adapter, or any file of weights",
        "Describe a saved adapter: method, base model, parameters, settings and digest; or what another program wrote: "
        "a LoRA and its relatives, a whole checkpoint. Needs no base.",
    )
    add_run(parser, "a run folder, a checkpoint folder, a PEFT folder, a .safetensors file, or USER/NAME of the hub")
    parser.add_argument(
        "--base",
        metavar="NAME|DIR|FILE",
        help="also say whether this is the base that it was made for, and how much its weights are changed",
    )


def run(arguments: Namespace) -> None:
    """Print the description. Raises UserError as `read_run` and `describe_weights`."""
    from ether_diffusion.adapters.foreign_lora import find_weights
    from ether_diffusion.exporting.weights_report import describe_weights
    from ether_diffusion.hub import local_copy

    path = local_copy(arguments.adapter)
    is_adapter = (path / "adapter_config.json").exists()
    file = None if is_adapter else find_weights(path)
    rows = _of_run(path, arguments.base) if file is None else describe_weights(file)
    if file is not None and arguments.base is not None:
        rows |= _on_base(arguments.base, file, rows.get("ether_diffusion.base_digest"))
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


def _of_run(path: Path, base: str | None) -> dict[str, Any]:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter
    from ether_diffusion.generation import read_run

    saved = read_run(path)
    rows = _of_adapter(saved)
    if base is not None and isinstance(saved.adapter, SavedAdapter):
        rows |= _on_base(base, saved.adapter)
    if saved.condition_encoder is not None:
        rows |= {} if rows else {"base model": saved.base_model}
        rows |= _of_encoder(saved.condition_encoder)
    return rows


def _on_base(name: str, what: SavedAdapter | Path, digest: str | None = None) -> dict[str, str]:
    """Whether an adapter or a LoRA file was made for a base, and how much it changes the base's weights.

    Args:
        digest: Of the base that the file was made for, as it states it.
    """
    from ether_diffusion.adapters.attach import adapted_layers
    from ether_diffusion.adapters.base_digest import base_digest
    from ether_diffusion.adapters.loading import load_adapter
    from ether_diffusion.adapters.targets import reach
    from ether_diffusion.exporting.origin_checks import same_base
    from ether_diffusion.exporting.weights_report import strengths, strengths_of_adapter
    from ether_diffusion.models.bases import load_base

    base = load_base(name)
    if isinstance(what, Path):
        same = base_digest(base.denoiser) == digest if digest else None
        rows = strengths(what, base.denoiser).rows
    else:
        same = same_base(what, base)
        load_adapter(base.denoiser, what)
        reached = str(reach(base.denoiser, adapted_layers(base.denoiser)))
        rows = {"reach": reached, **strengths_of_adapter(base.denoiser).rows}
    answers = {True: "equal to", False: "other weights than", None: "cannot be compared with"}
    return {"this base": f"{name}: {answers[same]} the base that it was made for", **rows}


def _of_adapter(run: SavedRun) -> dict[str, Any]:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter
    from ether_diffusion.exporting.origin_checks import certificate_of

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
    certificate = certificate_of(run)
    if certificate is not None:
        rows["certificate"] = certificate.line or "passed"
    if isinstance(saved, SavedAdapter):
        if certificate is not None and "digest" in certificate.base:
            rows["digest of its base"] = f"{certificate.base['digest']} in {certificate.base['dtype']}"
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

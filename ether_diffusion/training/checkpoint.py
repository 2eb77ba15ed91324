"""Checkpoints: trained weights and optimiser state, written whole or not at all, checked by digest when read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import checkpoint_name, digest_of_file, digest_of_json, list_checkpoints, whole_folder
from ether_diffusion.input_files import read_object

STATE, TRAINED, MANIFEST = "optimizer.safetensors", "trained.safetensors", "checkpoint.json"
WATCHED = "watched.safetensors"
OF_THE_PROCESS = ("foreach", "fused", "capturable", "differentiable")
"""Settings of torch's optimisers that choose an implementation, for the device of a run and not its numbers."""
OWN = "own_sha256"
"""The manifest's entry with its own digest; those of earlier versions have none."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint."""

    folder: Path
    step: int
    trainer: dict[str, Any]
    """The state that is not tensors: optimiser scalars, gradient scaler, settings."""

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimiser's state, bit for bit."""
        tensors = load_file(self.folder / STATE)
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        for index, scalars in self.trainer["optimizer_scalars"].items():
            state.setdefault(int(index), {}).update(scalars)
        groups = optimizer.state_dict()["param_groups"]
        for group, saved in zip(groups, self.trainer["optimizer_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name not in OF_THE_PROCESS})
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_trained(self, parameters: dict[str, nn.Parameter]) -> None:
        """Where the saved adapter is an average: restore the trained weights themselves, by name."""
        with torch.no_grad():
            for name, tensor in load_file(self.folder / TRAINED).items():
                parameters[name].copy_(tensor)

    def watched(self) -> dict[str, torch.Tensor] | None:
        """What was seen of the run so far, as `Watch.state`; None: an earlier version wrote the checkpoint."""
        path = self.folder / WATCHED
        return load_file(path) if path.is_file() else None


def save_checkpoint(
    root: Path,
    step: int,
    *,
    save_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter] | None,
    trainer: dict[str, Any],
    watched: dict[str, torch.Tensor] | None = None,
    keep_states: int,
    keep_checkpoints: int | None = None,
) -> Path:
    """Write `step-000200/` into `root`, then drop the optimiser states of all but the last `keep_states` checkpoints.

    The one just written counts as the last, whatever else is there.

    Args:
        save_weights: Writes the adapter into a folder.
        keep_checkpoints: Keep only this many of the last checkpoints; None: all.
        trained: The trained weights by name, where the adapter is an average of them.
        trainer: What else a resumed run needs, JSON-serialisable.
        watched: As `Watch.state`.
    """
    folder = root / checkpoint_name(step)
    with whole_folder(folder) as partial:
        save_weights(partial)
        tensors, scalars, groups = _parts_of(optimizer)
        save_file(tensors, partial / STATE)
        if trained is not None:
            weights = {name: parameter.detach().to("cpu").contiguous().clone() for name, parameter in trained.items()}
            save_file(weights, partial / TRAINED)
        if watched is not None:
            save_file(watched, partial / WATCHED)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        digests = {str(path.relative_to(partial)): digest_of_file(path) for path in files}
        state = {"step": step, "optimizer_scalars": scalars, "optimizer_groups": groups}
        manifest = {**state, **trainer, "sha256": digests}
        manifest[OWN] = _digest_of_manifest(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    kept = [*(other for other in list_checkpoints(root) if other != folder), folder]
    for old in kept[:-keep_states]:
        for name in (STATE, TRAINED, WATCHED):
            (old / name).unlink(missing_ok=True)
    if keep_checkpoints is not None:
        for old in kept[:-keep_checkpoints]:
            shutil.rmtree(old)
    return folder


def find_checkpoint(root: Path, resume: bool | str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from: the one named, or the last whole one; None if there is none yet.

    Args:
        resume: True or `latest`, or the path or name of a checkpoint folder.
        say: Called with a line for every damaged checkpoint that is skipped, and for one that cannot be checked.

    Raises:
        UserError: the checkpoint named does not exist or is damaged, or all are.
    """
    if isinstance(resume, str) and resume != "latest":
        named = root / resume if (root / resume).is_dir() else Path(resume)
        checkpoint = read_checkpoint(named)
        if isinstance(checkpoint, str):
            names = ", ".join(path.name for path in list_checkpoints(root)) or "none"
            raise UserError(f"training.resume: {checkpoint} Checkpoints here: {names}.")
        return _said(checkpoint, say)
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        checkpoint = read_checkpoint(folder)
        if isinstance(checkpoint, Checkpoint):
            return _said(checkpoint, say)
        say(f"{checkpoint} Trying the one before.")
    if folders:
        raise UserError(f"training.resume: none of the {len(folders)} checkpoints in {root} can be resumed from.")
    return None


def _said(checkpoint: Checkpoint, say: Callable[[str], None]) -> Checkpoint:
    if OWN not in checkpoint.trainer:
        say(f"{checkpoint.folder} is of an earlier version, whose {MANIFEST} has no digest: it is resumed unchecked.")
    return checkpoint


def read_checkpoint(folder: Path) -> Checkpoint | str:
    """A checkpoint whose files all have the digests that were recorded; else the reason why it is not one."""
    if not folder.is_dir():
        return f"{folder} is no checkpoint folder."
    try:
        manifest = read_object(folder / MANIFEST)
        step, digests, own = int(manifest["step"]), dict(manifest["sha256"]), manifest.get(OWN)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} is damaged: its {MANIFEST} is missing or unreadable."
    if own is not None and own != _digest_of_manifest(manifest):
        return f"{folder} is damaged: {MANIFEST} is not what was written."
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            if name in (STATE, TRAINED, WATCHED):
                return f"{folder} keeps no optimiser state any more (training.keep_states), only its adapter."
            return f"{folder} is damaged: {name} is missing."
        if digest_of_file(path) != digest:
            return f"{folder} is damaged: {name} is not what was written."
    return Checkpoint(folder, step, manifest)


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Of its content, whatever the line breaks: a changed step or weight decay would be resumed without a word."""
    content = {key: value for key, value in manifest.items() if key != OWN}
    return digest_of_json(json.loads(json.dumps(content)), sort_keys=True)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name, inner in values.items() for key, value in flatten(inner, f"{prefix}{name}.").items()}


def _parts_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, Any]]]:
    """An optimiser's state in three parts: tensors and scalars by parameter index, and its groups' settings."""
    tensors, scalars = {}, {}
    state = optimizer.state_dict()
    for index, values in state["state"].items():
        # bitsandbytes nests its quantised state one level deeper, and loads it from either level.
        nested = [item for value in values.values() if isinstance(value, dict) for item in value.items()]
        for name, value in [*((n, v) for n, v in values.items() if not isinstance(v, dict)), *nested]:
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu").contiguous().clone()
            else:
                scalars.setdefault(str(index), {})[name] = value
    # Optimisers keep numbers of their own in the groups, such as the distance that Prodigy has found.
    simple = (bool, int, float, str, list, tuple, type(None))
    groups = [
        {name: value for name, value in group.items() if name != "params" and isinstance(value, simple)}
        for group in state["param_groups"]
    ]
    return tensors, scalars, groups

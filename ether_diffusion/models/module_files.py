"""Whole modules on disk, in diffusers' layout: written whole or not at all, read strictly, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ether_diffusion.errors import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' names: from_pretrained reads them


def save_module(module: ModelMixin, folder: str | Path, texts: Mapping[str, str] | None = None) -> Path:
    """Write `config.json` and fp32 safetensors. An older folder is replaced only by a whole new one.

    Args:
        texts: Other files of the folder, by name.

    Raises:
        OSError: what was read back is not what was written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    state = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in module.state_dict().items()}
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    module.save_config(partial)
    for name, text in (texts or {}).items():
        (partial / name).write_text(text, encoding="utf-8")
    with safe_open(partial / WEIGHTS, framework="pt") as written:  # one tensor at a time: a whole UNet takes gigabytes
        if any(not torch.equal(written.get_tensor(key), tensor) for key, tensor in state.items()):
            raise OSError(f"{folder}: what was read back is not what was written. Is the disk full or failing?")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.replace(previous)
    partial.replace(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def check_module(module: nn.Module, folder: str | Path, what: str) -> None:
    """See whether saved weights are those of a module of this shape, which may be on the meta device.

    Args:
        what: The module's name for people.

    Raises:
        UserError: unreadable or incomplete files, weights that are missing, left over, of another shape or dtype, or
            not finite.
    """
    path, expected = Path(folder) / WEIGHTS, module.state_dict()
    with _opened(path, what) as file:
        found = set(file.keys())
        faults = []
        for kind, keys in (("missing", expected.keys() - found), ("left over", found - expected.keys())):
            if keys:
                faults.append(f"{len(keys)} {kind}, e.g. {min(keys)}")
        for key in sorted(expected.keys() & found):
            tensor, shape = file.get_tensor(key), tuple(expected[key].shape)
            if tuple(tensor.shape) != shape:
                faults.append(f"{key} is {tuple(tensor.shape)}, not {shape}")
            elif tensor.dtype != torch.float32:
                faults.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')}, not float32")
            elif not torch.isfinite(tensor).all():
                faults.append(f"{key} holds NaN or infinity")
    if faults:
        shown = "; ".join(faults[:3]) + ("; …" if len(faults) > 3 else "")
        raise UserError(f"{path} does not fit this {what} of {len(expected)} tensors: {shown}.")


def fill_module(module: nn.Module, folder: str | Path, what: str, scale: float = 1.0) -> None:
    """Copy saved weights into a module, whose parameters stay the same objects. All of them fit, or none is copied.

    Args:
        what: The module's name for people.
        scale: How far to go from the module's own weights to the saved ones: 0 stays, 1 is as saved.

    Raises:
        UserError: as `check_module`.
    """
    check_module(module, folder, what)
    with _opened(Path(folder) / WEIGHTS, what) as file, torch.no_grad():
        for key, tensor in module.state_dict().items():
            saved = file.get_tensor(key)
            if scale != 1:
                saved = torch.lerp(tensor.to("cpu", torch.float32), saved, scale)
            tensor.copy_(saved)


def find_module(path: str | Path, name: str, class_name: str) -> Path | None:
    """The folder of a saved module in a run folder, in the last of its checkpoints, or the folder itself.

    A run's `adapter/` counts as the run.

    Args:
        name: Of the folder in a run.
        class_name: Of the module, as its config says; folders of other modules are passed over.

    Returns:
        None: there is none.
    """
    path = Path(path)
    for candidate in (path, path / name, path.parent / name if path.name == "adapter" else path):
        if (candidate / CONFIG).is_file() and _class_name(candidate / CONFIG) == class_name:
            return candidate
    steps = (
        (int(found.parts[-3].removeprefix("step-")), found.parent)
        for found in path.glob(f"checkpoints/step-*/{name}/{CONFIG}")
        if found.parts[-3].removeprefix("step-").isdigit()
    )
    return max(steps, default=(0, None))[1]


def module_digest(folder: str | Path) -> str:
    """SHA-256 of a saved module's weights."""
    hashed = hashlib.sha256()
    with (Path(folder) / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 22):
            hashed.update(block)
    return hashed.hexdigest()


def number_of_saved(folder: str | Path, what: str) -> tuple[int, int]:
    """How many numbers, in how many tensors, a saved module holds. Raises UserError for a file that cannot be read."""
    with _opened(Path(folder) / WEIGHTS, what) as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - not a mapping
    return sum(torch.Size(shape).numel() for shape in shapes), len(shapes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's values by name; empty where there is none. Raises UserError for a file that cannot be read."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: cannot be read (expected values by name).")
    return values


def _opened(path: Path, what: str) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: the {what}'s weights are missing.")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the {what} cannot be read ({error}).") from error


def _class_name(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None

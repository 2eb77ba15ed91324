"""Whole modules on disk, in diffusers' layout: written whole or not at all, read strictly, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, digest_of_file, list_checkpoints, whole_folder
from ether_diffusion.input_files import check_file, read_object
from ether_diffusion.weight_files import loading, misfits, unwrapped

Module = TypeVar("Module", bound=ModelMixin)

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' names: from_pretrained reads them


def save_module(module: ModelMixin, folder: str | Path, texts: Mapping[str, str] | None = None) -> Path:
    """Write `config.json` and fp32 safetensors. An older folder is replaced only by a whole new one.

    Args:
        texts: Other files of the folder, by name.

    Raises:
        OSError: the file does not hold what was written.
    """
    folder = Path(folder)
    with whole_folder(folder) as partial, unwrapped(module) as bare:
        state = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in bare.state_dict().items()}
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
        bare.save_config(partial)  # pyright: ignore[reportCallIssue] - of a ModelMixin
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        with safe_open(partial / WEIGHTS, framework="pt") as written:  # one at a time: a whole UNet takes gigabytes
            if any(not torch.equal(written.get_tensor(key), tensor) for key, tensor in state.items()):
                raise OSError(f"{folder}: the file does not hold what was written. Is the disk full or failing?")
    return folder


def load_module(kind: type[Module], folder: str | Path, what: str, check: Callable[[Module], None]) -> Module:
    """Read a saved module, in fp32 on the CPU, frozen.

    Args:
        kind: Its class.
        what: Its name, for the message.
        check: Is called with a meta copy before weights are read; it raises UserError for a module that does not fit.

    Raises:
        UserError: as `check` and `check_module`; or the config cannot be read.
    """
    config_class: Any = kind  # models are ConfigMixins, too
    with loading(f"{Path(folder) / CONFIG}: not the config of a {what}"), torch.device("meta"):
        module = config_class.from_config(config_class.load_config(folder))
    check(module)
    module = module.to_empty(device="cpu")
    fill_module(module, folder, what)
    return module.eval().requires_grad_(False)


def check_module(module: nn.Module, folder: str | Path, what: str) -> None:
    """Refuse saved weights that do not fit a module, which may be a meta copy. `what` names it in the message.

    Raises:
        UserError: an unreadable file; weights that are missing, left over, of another shape or dtype, or not finite.
    """
    path, expected = Path(folder) / WEIGHTS, module.state_dict()
    with _open(path, what) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
        faults = misfits({key: tuple(tensor.shape) for key, tensor in expected.items()}, found)
        for key in sorted(expected.keys() & found.keys()):
            tensor = file.get_tensor(key)
            if tensor.dtype != torch.float32:
                faults.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')}, not float32")
            elif not torch.isfinite(tensor).all():
                faults.append(f"{key} holds NaN or infinity")
    if faults:
        shown = "; ".join(faults[:3]) + ("; …" if len(faults) > 3 else "")
        raise UserError(f"{path} does not fit this {what} of {len(expected)} tensors: {shown}.")


def fill_module(module: nn.Module, folder: str | Path, what: str, scale: float = 1.0) -> None:
    """Copy saved weights into a module, whose parameters stay the same objects. All of them fit, or none is copied.

    Args:
        scale: Weight of the saved values in the mean with the module's own: 0 changes nothing, 1 copies.

    Raises:
        UserError: as `check_module`.
    """
    check_module(module, folder, what)
    with _open(Path(folder) / WEIGHTS, what) as file, torch.no_grad():
        for key, tensor in module.state_dict().items():
            saved = file.get_tensor(key)
            if scale != 1:
                saved = torch.lerp(tensor.to("cpu", torch.float32), saved, scale)
            tensor.copy_(saved)


def find_module(path: str | Path, name: str, class_name: str) -> Path | None:
    """The folder of a saved module: the path itself, in a run folder, or in the last of its checkpoints that has one.

    A run's `adapter/` counts as the run.

    Args:
        name: Of the folder in a run.
        class_name: Of the module, as its config states it; folders of other modules are skipped.

    Raises:
        UserError: the folder is there, but not its config.
    """
    path = Path(path)
    for candidate in (path, path / name, path.parent / name if path.name == "adapter" else path):
        found = _class_name(candidate / CONFIG) if (candidate / CONFIG).is_file() else None
        if found == class_name:
            return candidate
        if found is None and candidate != path and candidate.is_dir():  # the run itself may have any name
            raise UserError(f"{candidate / CONFIG}: missing, or not the config of a {class_name}.")
    saved = [checkpoint / name for checkpoint in list_checkpoints(path / CHECKPOINTS)]
    return next((folder for folder in reversed(saved) if (folder / CONFIG).is_file()), None)


def module_digest(folder: str | Path) -> str:
    """SHA-256 of the file of a saved module's weights."""
    return digest_of_file(Path(folder) / WEIGHTS)


def number_of_saved(folder: str | Path, what: str) -> int:
    """The number of a saved module's parameters. Raises UserError for a file that cannot be read."""
    with _open(Path(folder) / WEIGHTS, what) as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - not a mapping
    return sum(torch.Size(shape).numel() for shape in shapes)


def _open(path: Path, what: str) -> Any:
    if not path.exists():
        raise UserError(f"{path}: the {what}'s weights are missing.")
    with loading(f"{path}: the {what} cannot be read"):
        return safe_open(check_file(path), framework="pt")


def _class_name(path: Path) -> Any:
    with contextlib.suppress(UserError):
        return read_object(path).get("_class_name")

"""A Stable Diffusion v1 in one file, `.safetensors` or `.ckpt`, in the original key layout. Nothing is fetched.

Every weight of the architecture must be in the file, and every weight of the file's UNet must be used. Schedule
buffers, `position_ids` and averaged copies (`model_ema.`) are ignored; anything else that is left over is noted.

Not diffusers' `from_single_file`: that leaves missing text weights on the meta device and ignores unknown UNet weights
without a word, names no missing weight, cannot check a file by its header, and refuses the first published `.ckpt`s.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import check_file
from ether_diffusion.weight_files import loading, read_checkpoint, read_pickled

from .families.stable_diffusion_v1 import CONFIGS, SCHEDULER, UNCHECKED, VAE, clip_tokenizer
from .original_layout import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, original_names, original_shape

SUFFIXES = (".safetensors", ".ckpt")

_SHORT_TEXT_PREFIX = TEXT_PREFIX.removesuffix("text_model.")  # in files that newer versions of transformers wrote
_IGNORED = re.compile(
    r"model_ema\..*|(.*\.)?position_ids|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas"
    r"|posterior_\w+|logvar|lvlb_weights"
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file: their shapes, and a function that reads one."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    read: Callable[[str], Tensor] = field(repr=False)


def is_single_file(name: str) -> bool:
    """Whether a base's name means a file rather than a hub name or a folder."""
    return Path(name).suffix in SUFFIXES and not Path(name).is_dir()


def open_weights(path: str | Path, key: str, remedy: str = "", *, allow_pickle: bool = False) -> WeightsFile:
    """Open a file of weights. Only the header of a `.safetensors` is read yet; a `.ckpt` is read whole.

    Args:
        key: The setting that names the file, for errors: `base_model` or `vae`.
        remedy: Sentences on how to name one, for errors.
        allow_pickle: Read Python objects of a `.ckpt`, which can run any code. Objects of packages that are not
            installed are ignored.

    Raises:
        UserError: not there, not readable, Python objects that are not allowed, or weights inside objects of packages
            that are not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{key}: {str(path)!r} does not exist. {remedy}".rstrip())
    with loading(f"{key}: {path} cannot be read"):
        check_file(path)
        if path.suffix == ".safetensors":
            file = safe_open(check_file(path), framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return WeightsFile(path, shapes, file.get_tensor)
        found, absent = _read_ckpt(path, key, allow_pickle)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    state = state if isinstance(state, Mapping) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if absent and not tensors:
        packages = ", ".join(absent)
        raise UserError(f"{key}: {path} keeps its weights in objects of packages that are not installed: {packages}.")
    return WeightsFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def check_single_file(file: WeightsFile, configs: Mapping[str, dict[str, Any]] = CONFIGS, *, vae: bool = True) -> None:
    """As `load_single_file`, as far as names and shapes show it; no weight is read."""
    _match(file, _empty_parts(configs, vae), configs)


def load_single_file(
    file: WeightsFile, dtype: torch.dtype, configs: Mapping[str, dict[str, Any]] = CONFIGS, *, vae: bool = True
) -> tuple[StableDiffusionPipeline, tuple[str, ...]]:
    """The pipeline in a file, and notes of the weights that were not used.

    Args:
        dtype: The weights are cast to it, one by one.
        configs: `unet`, `vae`, `text_encoder`; default: Stable Diffusion v1.5's.
        vae: False to load no VAE, whether the file has one or not; the pipeline's is None then.

    Raises:
        UserError: a weight is missing or of another shape, or the file is not a Stable Diffusion v1.
    """
    parts = _empty_parts(configs, vae)
    names, notes = _match(file, parts, configs)
    for part, module in parts.items():
        _fill(module, names[part], file, dtype)
    components: dict[str, Any] = {"vae": None, **parts, "scheduler": PNDMScheduler(**SCHEDULER)}
    return StableDiffusionPipeline(**components, tokenizer=clip_tokenizer(), **UNCHECKED), notes


def load_vae_file(file: WeightsFile, dtype: torch.dtype, config: dict[str, Any] = VAE) -> AutoencoderKL:
    """A VAE in the original layout, alone in its file or in a whole Stable Diffusion v1. Errors: `load_single_file`."""
    with init_empty_weights():
        vae = AutoencoderKL(**config)
    names = original_names("vae", vae.state_dict(), config)
    if not _any(file.shapes, VAE_PREFIX):
        names = {key: name.removeprefix(VAE_PREFIX) for key, name in names.items()}
    _refuse(file, "vae", "a VAE in the original layout", _faults(file, vae, names))
    _fill(vae, names, file, dtype)
    return vae


def _read_ckpt(path: Path, key: str, allow_pickle: bool) -> tuple[Any, tuple[str, ...]]:
    """The content of a `.ckpt`, and the packages of objects that cannot be imported."""
    try:
        return read_checkpoint(path), ()
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise UserError(
                f"{key}: {path} holds Python objects beside its weights, and reading them can run any code. If you "
                "trust where it comes from: allow_pickle=true."
            ) from error
    return read_pickled(path)


def _empty_parts(configs: Mapping[str, dict[str, Any]], vae: bool) -> dict[str, nn.Module]:
    with init_empty_weights():  # weights are on the meta device; buffers, which no file holds, are not
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
        if vae:
            parts["vae"] = AutoencoderKL(**configs["vae"])
    return parts


def _match(
    file: WeightsFile, parts: Mapping[str, nn.Module], configs: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """For each part the names in the file of its keys; and notes of what was left over."""
    _refuse_other_kinds(file)
    names = {part: original_names(part, module.state_dict(), configs[part]) for part, module in parts.items()}
    if not _any(file.shapes, TEXT_PREFIX) and _any(file.shapes, _SHORT_TEXT_PREFIX):
        long = names["text_encoder"].items()
        names["text_encoder"] = {key: _SHORT_TEXT_PREFIX + name.removeprefix(TEXT_PREFIX) for key, name in long}
    faults = [fault for part, module in parts.items() for fault in _faults(file, module, names[part])]
    used = {name for found in names.values() for name in found.values()}
    skipped = () if "vae" in parts else (VAE_PREFIX,)
    rest = [n for n in file.shapes if n not in used and not _IGNORED.fullmatch(n) and not n.startswith(skipped)]
    foreign = [name for name in rest if name.startswith(UNET_PREFIX)]
    if foreign:
        faults.append(f"its UNet has {_some(foreign)} that v1 does not have")
    _refuse(file, "base_model", "a Stable Diffusion v1", faults)
    return names, (f"{file.path.name}: not used: {_some(rest)}",) if rest else ()


def _faults(file: WeightsFile, module: nn.Module, names: Mapping[str, str]) -> list[str]:
    missing = [name for name in names.values() if name not in file.shapes]
    faults = [f"it lacks {_some(missing)}"] if missing else []
    for key, tensor in module.state_dict().items():
        name, shape = names[key], tuple(tensor.shape)
        found = file.shapes.get(name, shape)
        if found not in (shape, original_shape(name, shape)):
            faults.append(f"{name} is {found}, not {shape}")
            break
    return faults


def _fill(module: nn.Module, names: Mapping[str, str], file: WeightsFile, dtype: torch.dtype) -> None:
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    # Copied, not mapped: in a file weights lie at odd addresses, and kernels round by address in the last bit.
    state = {key: file.read(name).reshape(shapes[key]).to(dtype, copy=True) for key, name in names.items()}
    module.load_state_dict(state, strict=True, assign=True)


def _refuse(file: WeightsFile, key: str, kind: str, faults: list[str]) -> None:
    if faults:
        raise UserError(f"{key}: {file.path} is not {kind}: {'; '.join(faults)}.")


def _refuse_other_kinds(file: WeightsFile) -> None:
    """Name what another kind of file is, rather than what it lacks."""
    names = file.shapes
    attention = UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    entry = names.get(UNET_PREFIX + "input_blocks.0.0.weight", ())
    if _any(names, "conditioner."):
        kind = "a Stable Diffusion XL"
    elif _any(names, "cond_stage_model.model.") or names.get(attention, ())[1:] == (1024,):
        kind = "a Stable Diffusion v2; for v2 give a folder in diffusers' layout"
    elif entry[1:2] in ((9,), (8,)):
        kind = f"a Stable Diffusion for inpainting or editing ({entry[1]} input channels)"
    elif any("lora_" in name for name in names):
        kind = "a LoRA, not a base"
    elif _any(names, UNET_PREFIX, VAE_PREFIX, _SHORT_TEXT_PREFIX):
        return
    elif any("down_blocks." in name for name in names):
        kind = "one part of a Stable Diffusion in diffusers' layout; give the folder that has model_index.json"
    else:
        kind = f"no Stable Diffusion in the original layout: none of its {len(names)} tensors is named {UNET_PREFIX}…"
    raise UserError(f"base_model: {file.path} is {kind}. Single files of Stable Diffusion v1 can be loaded.")


def _any(names: Iterable[str], *starts: str) -> bool:
    return any(name.startswith(starts) for name in names)


def _some(names: list[str]) -> str:
    return f"{len(names):,} weight{'s' * (len(names) > 1)}, e.g. {names[0]}"

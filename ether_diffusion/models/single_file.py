"""A Stable Diffusion v1 in one file, `.safetensors` or `.ckpt`, in the original key layout. Nothing is fetched.

Every weight of the architecture must be in the file, and every weight of the file's UNet must be used. Schedule
buffers, `position_ids` and averaged copies (`model_ema.`) are passed over; anything else left over is noted.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.errors import UserError

from .original_layout import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX, text_names, unet_name, vae_name
from .pickled import load_pickled
from .stable_diffusion_v1 import CONFIGS, SCHEDULER, VAE, clip_tokenizer

SUFFIXES = (".safetensors", ".ckpt")

_UNUSED = re.compile(
    r"model_ema\..*|(.*\.)?position_ids|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas"
    r"|posterior_\w+|logvar|lvlb_weights"
)


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file: their shapes, and a function that reads one."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def is_single_file(name: str) -> bool:
    """Whether a base's name is meant for a file rather than a hub name or a folder."""
    return Path(name).suffix in SUFFIXES and not Path(name).is_dir()


def open_weights(path: str | Path, key: str, *, allow_pickle: bool = False) -> WeightsFile:
    """Open a file of weights. Of a `.safetensors` only the header is read yet; a `.ckpt` is read whole.

    Args:
        key: The setting that names the file, for errors: `base_model` or `vae`.
        allow_pickle: Let a `.ckpt` run code of its own while it is read, where it holds more than tensors. What it
            names of packages that are not installed is passed over.

    Raises:
        UserError: not there, not readable, Python objects in it that are not allowed, or weights within objects of
            packages that are not installed.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return WeightsFile(path, shapes, file.get_tensor)
        found, absent = _load_checkpoint(path, key, allow_pickle)
    except FileNotFoundError:
        raise UserError(f"{key}: {path} does not exist.") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{key}: {path} cannot be read ({' '.join(str(error).split())[:160]}).") from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    state = state if isinstance(state, Mapping) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if absent and not tensors:
        raise UserError(f"{key}: {path} keeps its weights in objects of packages that are not installed: {absent}.")
    return WeightsFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def check_single_file(file: WeightsFile, configs: Mapping[str, dict[str, Any]] = CONFIGS, *, vae: bool = True) -> None:
    """Compare names and shapes, reading no weight.

    Raises:
        UserError: as `load_single_file`.
    """
    _match(file, _empty_parts(configs, vae), configs)


def load_single_file(
    file: WeightsFile, dtype: torch.dtype, configs: Mapping[str, dict[str, Any]] = CONFIGS, *, vae: bool = True
) -> tuple[StableDiffusionPipeline, tuple[str, ...]]:
    """The pipeline in a file, and notes of what in the file was left over.

    Args:
        dtype: The weights are cast to it, one by one.
        configs: `unet`, `vae`, `text_encoder`; default: Stable Diffusion v1.5's.
        vae: False for a file whose VAE, if it has one, is not wanted; the pipeline's is None then.

    Raises:
        UserError: a weight is missing or of another shape, or the file holds something else than a Stable Diffusion v1.
    """
    parts = _empty_parts(configs, vae)
    matched, notes = _match(file, parts, configs)
    for part, module in parts.items():
        _fill(module, matched[part], file, dtype)
    components: dict[str, Any] = {
        "vae": None,
        **parts,
        "tokenizer": clip_tokenizer(),
        "scheduler": PNDMScheduler(**SCHEDULER),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**components), notes


def load_vae_file(file: WeightsFile, dtype: torch.dtype, config: dict[str, Any] = VAE) -> AutoencoderKL:
    """A VAE in the original layout: alone in its file, or that of a whole Stable Diffusion v1.

    Raises:
        UserError: a weight is missing or of another shape.
    """
    with init_empty_weights():
        vae = AutoencoderKL(**config)
    prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in file.shapes) else ""
    names = {key: (vae_name(key, config, prefix),) for key in vae.state_dict()}
    matched = _found(file, names)
    _refuse(file, "vae", "a VAE in the original layout", _faults(file, vae.state_dict(), names, matched))
    _fill(vae, matched, file, dtype)
    return vae


def _load_checkpoint(path: Path, key: str, allow_pickle: bool) -> tuple[Any, str]:
    """What is in a `.ckpt`, and the packages of which it names what cannot be imported, in words."""
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # of a zip archive, or of a pickle as torch wrote it before 1.6
            raise UserError(f"{key}: {path} cannot be read (it is not what torch.save writes).")
    try:
        return torch.load(path, map_location="cpu", weights_only=True), ""
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise UserError(
                f"{key}: {path} holds Python objects beside its weights, and reading them can run any code. If you "
                "trust where it comes from: allow_pickle=true in the config, --allow-pickle with generate."
            ) from error
    found, absent = load_pickled(path)
    return found, ", ".join(absent)


def _empty_parts(configs: Mapping[str, dict[str, Any]], vae: bool) -> dict[str, nn.Module]:
    with init_empty_weights():  # buffers that no file holds are made, weights are not
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
    """For each part its keys and the names that they have in the file; and notes of what was left over."""
    _refuse_other_kinds(file)
    namers: dict[str, Callable[[str], tuple[str, ...]]] = {
        "unet": lambda key: (unet_name(key, configs["unet"]),),
        "vae": lambda key: (vae_name(key, configs["vae"]),),
        "text_encoder": text_names,
    }
    matched, faults = {}, []
    for part, module in parts.items():
        state = module.state_dict()
        names = {key: namers[part](key) for key in state}
        matched[part] = _found(file, names)
        faults += _faults(file, state, names, matched[part])
    used = {name for found in matched.values() for name in found.values()}
    skipped = () if "vae" in parts else (VAE_PREFIX,)
    rest = [n for n in file.shapes if n not in used and not _UNUSED.fullmatch(n) and not n.startswith(skipped)]
    foreign = [name for name in rest if name.startswith(UNET_PREFIX)]
    if foreign:
        faults.append(f"it has {_some(foreign)} in its UNet that v1 has not")
    _refuse(file, "base_model", "a Stable Diffusion v1", faults)
    return matched, (f"{file.path.name}: not used: {_some(rest)}",) if rest else ()


def _found(file: WeightsFile, names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    present = {key: [name for name in candidates if name in file.shapes] for key, candidates in names.items()}
    return {key: candidates[0] for key, candidates in present.items() if candidates}


def _faults(
    file: WeightsFile, state: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], matched: Mapping[str, str]
) -> list[str]:
    missing = [names[key][0] for key in state if key not in matched]
    faults = [f"it lacks {_some(missing)}"] if missing else []
    for key, name in matched.items():
        found, wanted = file.shapes[name], tuple(state[key].shape)
        if found != wanted and found != (*wanted, 1, 1):  # attention in the VAE was once a convolution of one pixel
            faults.append(f"{name} is {found}, not {wanted}")
            break
    return faults


def _fill(module: nn.Module, matched: Mapping[str, str], file: WeightsFile, dtype: torch.dtype) -> None:
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    # Copied, not mapped: in a file weights lie at odd addresses, and kernels round by address in the last bit.
    state = {key: file.read(name).reshape(shapes[key]).to(dtype, copy=True) for key, name in matched.items()}
    module.load_state_dict(state, strict=True, assign=True)


def _refuse(file: WeightsFile, key: str, kind: str, faults: list[str]) -> None:
    if faults:
        raise UserError(f"{key}: {file.path} is not {kind}: {'; '.join(faults)}.")


def _refuse_other_kinds(file: WeightsFile) -> None:
    """Say what a file is, where that can be told, rather than what it lacks."""
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
    elif _any(names, UNET_PREFIX, VAE_PREFIX, *TEXT_PREFIXES):
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

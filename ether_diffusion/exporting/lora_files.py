"""LoRA files as other programs write and read them: the keys of kohya's scripts, of diffusers, and of PEFT.

Sources: kohya-ss/sd-scripts `networks/lora.py`; diffusers `loaders/lora_pipeline.py`; ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig
from torch import Tensor

from ether_diffusion.adapters.foreign_lora import kohya_key
from ether_diffusion.adapters.low_rank import LowRank
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.models.families.stable_diffusion_v1 import StableDiffusion1

Changes = Mapping[str, Mapping[str, LowRank]]
"""By part, as `unet` or `text_encoder`, and the name of a layer in it."""

SD1 = StableDiffusion1.kohya_prefixes

_PEFT = "base_model.model."
_DIFFUSERS_FILE, _PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


def write_kohya(
    path: Path, changes: Changes, dtype: torch.dtype, metadata: Mapping[str, str], prefixes: Mapping[str, str] = SD1
) -> None:
    """One file: `lora_down`, `lora_up` and `alpha` for each layer: the largest rank of the part.

    Args:
        prefixes: Of the keys, by part, as `Family.kohya_prefixes`.
    """
    tensors = {}
    for part, layers in changes.items():
        # One alpha for all: diffusers gives attention layers, and those of the text encoder, the commonest.
        alpha = max(change.rank for change in layers.values())
        for layer, change in layers.items():
            key = kohya_key(part, layer, prefixes)
            tensors[f"{key}.lora_down.weight"] = change.down.to(dtype)
            tensors[f"{key}.lora_up.weight"] = (_as_kernel(change) * (change.rank / alpha)).to(dtype)
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    write_whole(path, tensor_bytes(tensors, metadata))


def write_diffusers(folder: Path, changes: Changes, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """A folder for `pipeline.load_lora_weights`."""
    tensors = {}
    for part, layers in changes.items():
        tensors |= _peft_tensors(f"{part}.", layers, dtype)
    write_whole(folder / _DIFFUSERS_FILE, tensor_bytes(tensors, metadata))


def write_peft(folder: Path, changes: Changes, dtype: torch.dtype, base: str) -> None:
    """A LoRA folder of PEFT; a text encoder's in its subfolder `text_encoder`, or `text_encoder_2`."""
    for part, layers in changes.items():
        inside = folder / part if part.startswith("text_encoder") else folder
        ranks = {layer: change.rank for layer, change in layers.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        others = {layer: rank for layer, rank in sorted(ranks.items()) if rank != common}
        config = LoraConfig(
            r=common, lora_alpha=common, rank_pattern=others, alpha_pattern=others, target_modules=sorted(ranks)
        )
        config.base_model_name_or_path, config.inference_mode = base, True
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        write_whole(inside / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
        write_whole(inside / _PEFT_FILE, tensor_bytes(_peft_tensors(_PEFT, layers, dtype), {"format": "pt"}))


def read_back(
    path: Path, format: str, layers: Mapping[str, Iterable[str]], prefixes: Mapping[str, str] = SD1
) -> dict[str, dict[str, LowRank]]:
    """The changes in what one of these functions wrote, in single precision.

    Args:
        layers: Names of the layers that it must hold, by part; in `kohya` files points and underscores are one.

    Raises:
        UserError: a tensor is missing or left over.
    """
    found, left = {}, {}
    for part, names in layers.items():
        inside = path / part if format == "peft" and part.startswith("text_encoder") else path
        file = {"kohya": path, "diffusers": path / _DIFFUSERS_FILE, "peft": inside / _PEFT_FILE}[format]
        if file not in left:
            left[file] = safetensors.torch.load_file(file)
        found[part] = {name: _take_change(left[file], _keys_of(format, part, name, prefixes), file) for name in names}
    for file, rest in left.items():
        if rest:
            raise UserError(f"{file}: {len(rest)} tensors more than were written, e.g. {min(rest)}.")
    return found


def _keys_of(format: str, part: str, layer: str, prefixes: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a layer's `down` and `up` in a LoRA file, and that of its `alpha`, which `kohya` files have."""
    if format == "kohya":
        key = kohya_key(part, layer, prefixes)
        return f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"
    prefix = f"{part}.{layer}" if format == "diffusers" else _PEFT + layer
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _take_change(tensors: dict[str, Tensor], keys: tuple[str, ...], file: Path) -> LowRank:
    """Take the change of a layer out of a file's tensors, in single precision. Raises UserError: one is missing."""
    for key in keys:
        if key not in tensors:
            raise UserError(f"{file}: {key} is missing.")
    A, B, *alpha = (tensors.pop(key) for key in keys)
    A, B = A.float(), B.float()
    scale = float(alpha[0]) / len(A) if alpha else 1
    return LowRank(B.flatten(1) * scale, A)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file. Equal tensors and metadata give equal bytes: safetensors orders none."""
    content = safetensors.torch.save({key: tensors[key].contiguous() for key in sorted(tensors)}, dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _peft_tensors(prefix: str, layers: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for layer, change in layers.items():
        tensors[f"{prefix}{layer}.lora_A.weight"] = change.down.to(dtype)
        tensors[f"{prefix}{layer}.lora_B.weight"] = _as_kernel(change).to(dtype)
    return tensors


def _as_kernel(change: LowRank) -> Tensor:
    """`up` in LoRA's shape: (out, rank), or (out, rank, 1, 1) for a convolution."""
    return change.up.reshape(*change.up.shape, *[1] * (change.down.ndim - 2))

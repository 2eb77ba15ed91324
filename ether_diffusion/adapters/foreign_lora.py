"""LoRA files of any program, read: the keys of kohya's scripts, of diffusers old and recent, and of PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import digest_of_file
from ether_diffusion.input_files import check_file
from ether_diffusion.weight_files import loading

from .low_rank import LowRank

METHOD_KEYS = {
    "LoRA": r"\.lora_(?:down|up|A|B)(?:\.\w+)?\.weight$|[._]lora(?:_linear_layer)?\.(?:down|up)\.weight$",
    "DoRA": r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)$",
    "LoRA with a Tucker core": r"\.lora_mid\.weight$",
    "LoHa": r"\.hada_w\d",
    "LoKr": r"\.lokr_w\d",
    "OFT": r"\.(?:oft_blocks|oft_diag|oft_R\b.*)$",
    "ETHER or ETHER+": r"\.ether_(?:in|out)\.",
    "IA3": r"\.(?:ia3_l|on_input)\b",
}
"""Patterns of the keys by which methods are recognised; a later one that matches says more than an earlier one."""

_KOHYA = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "transformer": "lora_transformer_",
}
_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<recent>down|up|mid|A|B)(?:\.\w+)?\.weight|[._]lora(?:_linear_layer)?\.(?P<old>down|up)"
    r"\.weight"
    r"|\.(?P<alpha>alpha))"
)
_ROLES = {"A": "down", "B": "up"}
_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings, as JSON: ranks and alphas."""


@dataclass(frozen=True, repr=False)
class LoraFile:
    """A LoRA file, read once, its scales (alpha / rank) multiplied in."""

    path: Path
    layers: Mapping[str, LowRank]
    """By the names that kohya's files have for layers, whatever names the file has: `lora_unet_mid_block_…`."""
    digest: str
    """SHA-256 of the file."""
    base_model: str | None = None
    """The base that it was exported for, if this package did that."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self.layers)} layers)"

    def changes_of(self, model: nn.Module, part: str) -> dict[str, LowRank]:
        """The changes of the weights of a model, by the names of its layers; layers that it lacks are left out.

        Args:
            part: The model's name in a pipeline, as `unet` or `text_encoder`.

        Raises:
            UserError: the factors of a layer do not make its weight's shape.
        """
        found = {}
        for name, module in model.named_modules():
            change = self.layers.get(kohya_key(part, name))
            if change is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            up, down = change
            shape = tuple(module.weight.shape)
            if up.shape[0] != shape[0] or down[0].numel() != math.prod(shape[1:]):
                made = (up.shape[0], *down.shape[1:])
                raise UserError(
                    f"{self.path} does not fit this base: it changes a weight {made} at {name}, not {shape}."
                )
            found[name] = LowRank(up, down.reshape(-1, *shape[1:]))
        return found

    def check_fits(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse the file if a layer of it is in none of these parts of a base. Raises UserError."""
        known = {kohya_key(part, name) for part, model in models.items() for name, _ in model.named_modules()}
        left = sorted(self.layers.keys() - known)
        if left:
            count = "none" if len(left) == len(self.layers) else f"only {len(self.layers) - len(left)}"
            raise UserError(
                f"{self.path} does not fit this base, which has {count} of its {len(self.layers)} layers; not, e.g., "
                f"{left[0]}. Is it for another base?"
            )


def kohya_key(part: str, layer: str, prefixes: Mapping[str, str] = _KOHYA) -> str:
    """A layer's name in kohya's files: `lora_unet_mid_block_attentions_0_proj_in`.

    Args:
        prefixes: By part. With two text encoders kohya's files name the first `lora_te1_`; a `LoraFile` never does.
    """
    # Versions of transformers from 5.6 have no `text_model`; the programs that read the files expect it.
    full = f"text_model.{layer.removeprefix('text_model.')}" if part.startswith("text_encoder") else layer
    return prefixes[part] + full.replace(".", "_")


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA file. Without an alpha, a layer's scale is 1.

    Args:
        path: A `.safetensors` file, or a folder that holds one.

    Raises:
        UserError: not there or unreadable; another method's file, or keys of no LoRA; factors that do not fit each
            other; an alpha that is no number; values that are not finite.
    """
    path = Path(path)
    file = find_weights(path)
    if file is None:
        raise UserError(f"{path}: {'no single .safetensors file in it' if path.is_dir() else 'not found'}.")
    with loading(f"{file}: not a LoRA in a .safetensors file"), safe_open(check_file(file), "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        facts = opened.metadata() or {}
    grouped = _grouped(file, tensors)
    settings = _peft_settings(file, facts)
    layers = {_kohya_name(layer): _change(file, layer, own, settings) for layer, own in sorted(grouped.items())}
    if len(layers) < len(grouped):
        raise UserError(f"{file}: two sets of keys name one layer.")
    return LoraFile(file, layers, digest_of_file(file), facts.get("ether_diffusion.base"))


def find_weights(path: str | Path) -> Path | None:
    """The `.safetensors` file that a path names, or the only one in a folder of another program; None: neither."""
    path = Path(path)
    if path.is_file():
        return path
    found = [file for file in path.glob("*.safetensors") if file.is_file()] if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def _grouped(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their roles: down, up, mid and alpha."""
    other = next((name for name, keys in list(METHOD_KEYS.items())[3:] if _has(keys, tensors)), None)
    if other or _has(METHOD_KEYS["DoRA"], tensors):
        raise UserError(f"{file} holds {other or 'DoRA'}, not a LoRA.")
    grouped, stray = {}, []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            stray.append(key)
            continue
        role = found["recent"] or found["old"] or found["alpha"]
        grouped.setdefault(found["layer"], {})[_ROLES.get(role, role)] = tensor
    if stray or not grouped:
        what = f"{len(stray)} of its {len(tensors)} tensors are" if stray else "it has no tensor, nothing is"
        raise UserError(f"{file}: {what} not a LoRA's{f', e.g. {min(stray)}' if stray else ''}.")
    return grouped


def _has(pattern: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(re.search(pattern, key) for key in tensors)


def _kohya_name(layer: str) -> str:
    """The name of a layer in kohya's files, from its name in any file."""
    if layer.startswith("lora_"):
        return re.sub("^lora_te1_", _KOHYA["text_encoder"], layer)
    name = re.sub(r"\.processor\.(to_\w+)$", r".\1", layer.removeprefix("base_model.model."))
    name = re.sub(r"self_attn\.to_(\w+)$", r"self_attn.\1_proj", re.sub(r"(attn\d)\.to_out$", r"\1.to_out.0", name))
    part, _, rest = name.partition(".")
    if part in _KOHYA:
        return kohya_key(part, rest)
    is_text = re.match(r"(?:text_model\.)?encoder\.layers\.", name)
    return kohya_key("text_encoder" if is_text else "unet", name)


def _change(file: Path, layer: str, own: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LowRank:
    """The change of a layer from its tensors."""
    for role in ("down", "up"):
        if role not in own:
            raise UserError(f"{file}: {layer} has no {role} factor.")
    for role, tensor in own.items():
        if not tensor.is_floating_point() and role != "alpha":
            raise UserError(f"{file}: the {role} factor of {layer} is {tensor.dtype}; expected floating numbers.")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {role} of {layer} holds NaN or infinity.")
    down, up, mid = own["down"].float(), own["up"].float(), own.get("mid")
    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    empty = not down.numel() or not up.numel()
    if empty or min(down.ndim, up.ndim) < 2 or up[0, 0].numel() != 1 or up.shape[1] != len(down):
        raise UserError(f"{file}: the factors of {layer} do not fit each other: {shapes}.")
    rank, up = len(down), up.flatten(1)
    if mid is not None:  # down is 1 x 1 then, and the kernel is in the middle
        if tuple(mid.shape[:2]) != (rank, rank) or down[0, 0].numel() != 1:
            raise UserError(f"{file}: the factors of {layer} do not fit each other: {shapes}, mid {tuple(mid.shape)}.")
        down = torch.tensordot(mid.float().movedim(1, -1), down.flatten(1), dims=1).movedim(-1, 1).contiguous()
    return LowRank(up * _scale(file, layer, own.get("alpha"), rank, settings), down)


def _scale(file: Path, layer: str, alpha: Tensor | None, rank: int, settings: Mapping[str, Any]) -> float:
    """Alpha over rank, from the tensor next to the factors or PEFT's settings of the part."""
    if alpha is not None:
        if alpha.numel() != 1:
            raise UserError(f"{file}: alpha of {layer} has shape {tuple(alpha.shape)}; expected one number.")
        return float(alpha) / rank
    part, _, name = layer.partition(".")
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
    if not own:
        return 1.0
    patterns = own.get("alpha_pattern") or {}
    try:
        key = next((key for key in patterns if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)), None)
    except re.error as error:
        raise UserError(f"{file}: {_METADATA}: alpha_pattern: not a regular expression ({error}).") from error
    value = patterns[key] if key is not None else own.get("lora_alpha", rank)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{file}: {_METADATA}: the alpha of {layer} is {value!r:.40}; expected a number.")
    return value / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _peft_settings(file: Path, facts: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings in a file of diffusers, by part and name: `unet.lora_alpha`."""
    with loading(f"{file}: {_METADATA} is not JSON"):
        settings = json.loads(facts.get(_METADATA, "{}"))
        if any(not isinstance(settings.get(f"{part}.alpha_pattern") or {}, dict) for part in _KOHYA):
            raise TypeError("alpha_pattern is no object")
    return settings

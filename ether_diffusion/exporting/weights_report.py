"""What a file of weights is, whoever wrote it: an adapter of which method, for which base, or a whole model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ether_diffusion.adapters.foreign_lora import METHOD_KEYS, read_lora
from ether_diffusion.adapters.low_rank import adapted_layers, merged_change
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import check_file
from ether_diffusion.models.original_layout import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX

Shapes = Mapping[str, tuple[int, ...]]

_LAYOUTS = {
    "kohya": r"^lora_(?:unet|te\d?|transformer)_",
    "PEFT": r"^base_model\.model\.",
    "diffusers": r"^(?:unet|text_encoder(?:_\d)?|transformer)\.",
}
_PARTS = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": TEXT_PREFIX.removesuffix("transformer.text_model.")}
_WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 2048: "Stable Diffusion XL"}
"""By the width of the text that cross-attention reads."""
_TEXT_INPUT = re.compile(
    r"attn2[._](?:processor\.)?to_[kv](?:_lora)?(?:\.lora_down|\.lora_A(?:\.\w+)?|\.down)?\.weight$"
)
_SHOWN = (
    *("ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_output_name", "ss_resolution"),
    *("ss_max_train_steps", "modelspec.title", "modelspec.trigger_phrase"),
)


@dataclass(frozen=True)
class Strengths:
    """How much an adapter changes the weights of a base: norm of the change over norm of the weight, by layer."""

    layers: Mapping[str, float]

    @property
    def rows(self) -> dict[str, str]:
        """Rows for people: least, middle and largest, and where the largest is."""
        if not self.layers:
            return {"strength": "no layer of this base has a change"}
        ordered = sorted(self.layers.items(), key=lambda item: item[1])
        low, middle, high = (ordered[k][1] for k in (0, len(ordered) // 2, -1))
        return {
            "strength": f"{low:.2g} to {high:.2g} of the weight's norm a layer, middle {middle:.2g}",
            "strongest": ordered[-1][0],
        }


def describe_weights(path: Path) -> dict[str, str]:
    """Rows that describe a file by its keys, shapes and metadata. No weight is read.

    Raises:
        UserError: it is no safetensors file.
    """
    shapes, facts = _header(path)
    method = _method(shapes)
    rows = {"file": str(path), "method": method or _whole(shapes), "tensors": f"{len(shapes):,}"}
    rows["numbers"] = f"{sum(torch.Size(shape).numel() for shape in shapes.values()):,}"
    if method:
        rows["keys"] = next((name for name, keys in _LAYOUTS.items() if _count(keys, shapes)), "of another layout")
    ranks = [shape[0] for key, shape in shapes.items() if re.search(r"lora_?(?:down|A)(?:\.\w+)?\.weight$", key)]
    if ranks:
        counted = Counter(ranks).most_common()
        rows["layers"] = f"{len(ranks)}"
        rows["rank"] = ", ".join(f"{rank} ({count})" for rank, count in counted) if counted[1:] else str(counted[0][0])
        rows["alpha"] = "on all layers" if _count(r"\.alpha$", shapes) == len(ranks) else _alphas(shapes)
    rows["base architecture"] = _architecture(shapes)
    rows |= {key: facts[key] for key in sorted(facts) if key in _SHOWN or key.startswith("ether_diffusion.")}
    return rows


@torch.no_grad()
def strengths(path: Path, model: nn.Module, part: str = "unet") -> Strengths:
    """How much a LoRA file changes each weight of a base's part. Raises UserError as `read_lora`."""
    if not (_method(_header(path)[0]) or "").startswith("LoRA"):
        return Strengths({})
    changes = read_lora(path).changes_of(model, part)
    weights = {name: model.get_parameter(f"{name}.weight") for name in changes}
    return Strengths({name: float(changes[name].dense().norm() / weights[name].float().norm()) for name in changes})


@torch.no_grad()
def strengths_of_adapter(model: nn.Module) -> Strengths:
    """How much a loaded adapter changes each weight of a model."""
    found = {}
    for name, layer in adapted_layers(model).items():
        change, weight = merged_change(layer)
        found[name] = float(change.norm() / weight.norm())
    return Strengths(found)


def _header(path: Path) -> tuple[Shapes, dict[str, str]]:
    try:
        with safe_open(check_file(path), "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())}).") from error


def _method(shapes: Shapes) -> str | None:
    return next((name for name, keys in reversed(METHOD_KEYS.items()) if _count(keys, shapes)), None)


def _count(pattern: str, shapes: Shapes) -> int:
    return sum(1 for key in shapes if re.search(pattern, key))


def _alphas(shapes: Shapes) -> str:
    count = _count(r"\.alpha$", shapes)
    return f"on {count} layers only; some programs guess the others" if count else "none: the scale is 1"


def _whole(shapes: Shapes) -> str:
    parts = [name for name, prefix in _PARTS.items() if any(key.startswith(prefix) for key in shapes)]
    if any(key.startswith("conditioner.") for key in shapes):
        parts.append("text encoders")
    if parts:
        return f"a whole model in the original layout: {', '.join(parts)}"
    return "a UNet in diffusers' layout" if "down_blocks.0.resnets.0.conv1.weight" in shapes else "not recognised"


def _architecture(shapes: Shapes) -> str:
    """The base that the shapes fit."""
    transformer = [key for key in shapes if re.search(r"(?:^|[._])(?:single_)?transformer_blocks[._]\d", key)]
    if any(re.search(r"single_transformer_blocks[._]", key) for key in transformer):
        return "FLUX"
    if any(re.match(r"(?:lora_)?transformer[._]", key) for key in shapes):
        return "a diffusion transformer"
    widths = {shape[1] for key, shape in shapes.items() if _TEXT_INPUT.search(key) and len(shape) > 1}
    known = [_WIDTHS[width] for width in sorted(widths) if width in _WIDTHS]
    if known:
        return known[0]
    return f"cross-attention to text of width {min(widths)}" if widths else "not recognised"

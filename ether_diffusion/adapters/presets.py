"""The presets of targets as layers of a denoiser's class: names of attention and mlp layers, and layers to leave out.

Stable Diffusion's UNets have lists of endings (`targets.PRESETS`). Transformers have a row in `ARCHITECTURES`, or the
common names of diffusers' transformers. There `attention` is every projection of every attention, those of the text
stream included; `attention+mlp` also the feed-forward layers; `linear` every linear layer of the blocks, modulations
included; `all` every linear layer of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

NAMES = ("attention", "attention+mlp", "linear", "all")
_ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MLP = (r"ff\.net\.0\.proj", r"ff\.net\.2", r"ff_context\.net\.0\.proj", r"ff_context\.net\.2")
_BLOCK = re.compile(r".+?\.\d+\.")
"""The start of the names of layers in a model's list of blocks."""


@dataclass(frozen=True)
class Architecture:
    """The layers of a class of denoisers, as regular expressions of the ends of their names."""

    attention: tuple[str, ...] = _ATTENTION
    mlp: tuple[str, ...] = _MLP
    unused: tuple[str, ...] = ()
    """Whole names of layers that get no gradient, or whose forward pass is bypassed. `{last}` is the number of the last
    of `transformer_blocks`: where its text stream is dropped, what only that stream depends on has no effect."""

    def unused_in(self, model: nn.Module) -> list[str]:
        """The layers of a model that are left out, as regular expressions of whole names."""
        blocks: Any = getattr(model, "transformer_blocks", ())
        return [pattern.replace("{last}", str(len(blocks) - 1)) for pattern in self.unused]


_FLUX_MLP = (*_MLP, "proj_mlp", r"single_transformer_blocks\.\d+\.proj_out")

ARCHITECTURES: dict[str, Architecture] = {
    "AuraFlowTransformer2DModel": Architecture(mlp=(r"(?:ff|ff_context)\.(?:linear_1|linear_2|out_projection)",)),
    "BriaTransformer2DModel": Architecture(mlp=_FLUX_MLP),
    "ChromaTransformer2DModel": Architecture(mlp=_FLUX_MLP),
    "Flux2Transformer2DModel": Architecture(
        # A single block has its attention's and its mlp's first layers in one, and their last ones.
        attention=(*_ATTENTION, "to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out"),
        mlp=(r"(?:ff|ff_context)\.linear_(?:in|out)",),
    ),
    "FluxTransformer2DModel": Architecture(mlp=_FLUX_MLP),
    "HiDreamImageTransformer2DModel": Architecture(
        attention=(r"attn1\.to_(?:q|k|v|out)(?:_t)?",),
        mlp=(r"(?:shared_experts|ff_t)\.w[123]",),
        unused=(r".*\.ff_i\.experts\..*",),  # an expert that no token goes to gets no gradient
    ),
    "HunyuanDiT2DModel": Architecture(
        unused=(r"time_extra_emb\.pooler\.[qkvc]_proj",)  # torch's own attention reads their weights
    ),
    "HunyuanImageTransformer2DModel": Architecture(mlp=_FLUX_MLP),
    "HunyuanVideoTransformer3DModel": Architecture(mlp=_FLUX_MLP),
    "Kandinsky5Transformer3DModel": Architecture(
        attention=(r"(?:self|cross)_attention\.(?:to_query|to_key|to_value|out_layer)",),
        mlp=(r"feed_forward\.(?:in_layer|out_layer)",),
    ),
    "Lumina2Transformer2DModel": Architecture(attention=_ATTENTION[:4], mlp=(r"feed_forward\.linear_[123]",)),
    "MochiTransformer3DModel": Architecture(
        attention=tuple(rf"attn1\.{name}" for name in _ATTENTION),  # and not the pooling of the prompt
        unused=(r"transformer_blocks\.{last}\.attn1\.add_q_proj",),
    ),
    "PRXTransformer2DModel": Architecture(
        attention=("img_qkv_proj", "txt_kv_proj", r"to_out\.0"), mlp=("gate_proj", "up_proj", "down_proj")
    ),
    "QwenImageTransformer2DModel": Architecture(
        mlp=(r"(?:img|txt)_mlp\.net\.(?:0\.proj|2)",),
        unused=(r"transformer_blocks\.{last}\.(?:attn\.add_q_proj|attn\.to_add_out|txt_mlp\.net\.(?:0\.proj|2))",),
    ),
    "SD3Transformer2DModel": Architecture(unused=(r"transformer_blocks\.{last}\.attn\.add_q_proj",)),
    "SanaTransformer2DModel": Architecture(attention=_ATTENTION[:4], mlp=("conv_inverted", "conv_point")),
    "WanTransformer3DModel": Architecture(mlp=(r"ffn\.net\.0\.proj", r"ffn\.net\.2")),
    "ZImageTransformer2DModel": Architecture(attention=_ATTENTION[:4], mlp=("w1", "w2", "w3")),
}
"""By the class's name."""


def presets_of(model: nn.Module) -> dict[str, list[str] | str] | None:
    """The targets that presets stand for in this model, by name; None: a UNet, or a model without transformer blocks,
    whose presets are `targets.PRESETS`."""
    row = architecture_of(model)
    if row is None:
        return None
    unused = row.unused_in(model)
    layers = {name: module for name, module in _linear_layers(model) if not _any_of(unused, name)}
    inside = [name for name in layers if _BLOCK.match(name)]
    return {
        "attention": _endings(row.attention, unused),
        "attention+mlp": _endings((*row.attention, *row.mlp), unused),
        "linear": _pattern(inside, unused),
        "all": _pattern(layers, unused),
    }


def architecture_of(model: nn.Module) -> Architecture | None:
    """The row of a model's class; None: it has no presets of its own."""
    name = type(model).__name__
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    return Architecture() if "Transformer" in name and type(model).__module__.startswith("diffusers.") else None


def attention_layers(model: nn.Module, unet_endings: Sequence[str]) -> list[str]:
    """The names of all attention projections of a model, used or not.

    Args:
        unet_endings: The ends of these names in UNets.
    """
    row = architecture_of(model)
    target = _endings(row.attention if row else tuple(map(re.escape, unet_endings)), ())
    patterns = [target] if isinstance(target, str) else [rf"(?:.*\.)?{re.escape(ending)}" for ending in target]
    return [name for name, _ in _linear_layers(model) if _any_of(patterns, name)]


def _linear_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Linear layers and 1 x 1 convolutions of at least two features, by name; those that carry adapters too."""
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not name.endswith("base_layer") and _is_linear(layer):
            yield name, layer


def _is_linear(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear) and min(layer.in_features, layer.out_features) > 1


def _endings(patterns: tuple[str, ...], unused: Sequence[str]) -> list[str] | str:
    """A target of all names with these ends: a plain list where there is nothing but letters in them."""
    plain = [pattern.replace("\\.", ".") for pattern in patterns]
    if not unused and not any(re.search(r"[^\w.]", ending) for ending in plain):
        return plain
    return _without(unused) + rf"(?:.*\.)?(?:{'|'.join(patterns)})"


def _pattern(names: Iterable[str], unused: Sequence[str]) -> str:
    """A target of these names, with the numbers of blocks left open."""
    found = {re.sub(r"(?<=\.)\d+(?=\\?\.)", r"\\d+", re.escape(name)) for name in names}
    return _without(unused) + f"(?:{'|'.join(sorted(found))})"


def _without(unused: Sequence[str]) -> str:
    return f"(?!(?:{'|'.join(unused)})$)" if unused else ""


def _any_of(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)

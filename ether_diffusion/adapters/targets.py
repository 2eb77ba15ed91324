"""The layers of a model that an adapter is attached to: named sets of modules, or patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ether_diffusion.errors import UserError

from .presets import attention_layers, presets_of

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_GEGLU = ("ff.net.0.proj",)

PRESETS: dict[str, tuple[str, ...]] = {
    # The paper's DreamBooth set: q, k, v and output projection of every self- and cross-attention.
    "attention": _ATTENTION,
    # The paper's controllable set, as its parameter counts suggest.
    "attention+geglu": (*_ATTENTION, *_GEGLU),
    "attention+mlp": (*_ATTENTION, *_GEGLU, "ff.net.2"),
    # Every linear layer of the transformer blocks.
    "linear": (*_ATTENTION, *_GEGLU, "ff.net.2"),
    # And the projections into and out of the transformer blocks: 1x1 convolutions in Stable Diffusion v1.
    "all": (*_ATTENTION, *_GEGLU, "ff.net.2", "proj_in", "proj_out"),
}
"""Of UNets; those of transformers are in `presets.py`."""


def resolved_target(target: str | Sequence[str], model: nn.Module) -> str | list[str] | None:
    """The layers that a preset stands for in this model; None: the target means the same in all models.

    Raises:
        UserError: this model has no such preset.
    """
    own = presets_of(model) if isinstance(target, str) and target in PRESETS else None
    if own is None:
        return None
    assert isinstance(target, str)
    if target not in own:
        raise UserError(f"adapter.target: {type(model).__name__} has no preset {target!r}; it has: {', '.join(own)}.")
    return own[target]


@dataclass(frozen=True)
class Reach:
    """How much of a model an adapter reaches."""

    attention: int
    """The number of attention projections that it adapts, of `all_attention`."""
    all_attention: int
    parameters: int
    """The number of weights of the adapted layers, of `all_parameters`."""
    all_parameters: int

    def __str__(self) -> str:
        share = self.parameters / max(1, self.all_parameters)
        return f"{self.attention} of {self.all_attention} attention layers, {share:.1%} of all parameters"


def reach(model: nn.Module, layers: Iterable[str]) -> Reach:
    """How much of a model adapters in these layers reach. The model may carry them."""
    adapted, attention = set(layers), attention_layers(model, _ATTENTION)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    counts = {name: _weights(module) for name, module in model.named_modules() if not name.startswith(inside)}
    return Reach(
        attention=sum(name in adapted for name in attention),
        all_attention=len(attention),
        parameters=sum(counts.get(name, 0) for name in adapted),
        all_parameters=sum(counts.values()),
    )


def _weights(module: Any) -> int:
    """The number of a module's own frozen weights and biases, before they were quantised."""
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    own = {name: tensor.numel() for name, tensor in layer.named_parameters(recurse=False)}
    if isinstance(layer, nn.Linear) and "weight" in own:  # packed, it has another shape
        own["weight"] = layer.in_features * layer.out_features
    return sum(own.values())


def target_modules(target: str | Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`: a UNet preset's suffixes, a list of names or suffixes, or a regular expression."""
    if isinstance(target, str):
        return list(PRESETS[target]) if target in PRESETS else target
    return list(target)


def check_targets(model: nn.Module, config: PeftConfig, target: str | Sequence[str]) -> list[str]:
    """Names of the modules of `model` that `config` matches.

    Raises:
        UserError: nothing matches, with the presets and modules of similar names; or not a regular expression.
    """
    kinds = nn.Linear, nn.Conv2d, BaseTunerLayer
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    try:
        matched = [name for name in layers if check_target_module_exists(config, name)]
    except re.error as error:
        raise UserError(f"adapter.target: {target!r} is not a regular expression: {error}.") from error
    if matched:
        return matched
    given = [target] if isinstance(target, str) else list(target)
    presets = presets_of(model) or PRESETS
    endings = {".".join(name.split(".")[-k:]) for name in layers for k in (1, 2, 3) if not name.endswith(".0") or k > 1}
    near = [hit for pattern in given for hit in difflib.get_close_matches(pattern, [*presets, *sorted(endings)], n=3)]
    hint = f" Near: {', '.join(dict.fromkeys(near))}." if near else ""
    raise UserError(
        f"adapter.target: {', '.join(map(repr, given))} matches no linear or convolution layer of "
        f"{type(model).__name__}.{hint} Presets: {', '.join(presets)}; or a list of module names or their endings; or "
        "one regular expression."
    )

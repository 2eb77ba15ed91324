"""The layers of a UNet that an adapter is attached to: named sets of modules, or patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ether_diffusion.errors import UserError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_GEGLU = ("ff.net.0.proj",)

PRESETS: dict[str, tuple[str, ...]] = {
    # The paper's DreamBooth set: q, k, v and output projection of every self- and cross-attention.
    "attention": _ATTENTION,
    # The paper's controllable set, as its parameter counts suggest.
    "attention+geglu": (*_ATTENTION, *_GEGLU),
    # Every linear layer of the transformer blocks.
    "linear": (*_ATTENTION, *_GEGLU, "ff.net.2"),
    # And the projections into and out of the transformer blocks: 1x1 convolutions in Stable Diffusion v1.
    "all": (*_ATTENTION, *_GEGLU, "ff.net.2", "proj_in", "proj_out"),
}


def target_modules(target: str | Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`: a preset's suffixes, a list of names or suffixes, or a regular expression."""
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
    endings = {".".join(name.split(".")[-k:]) for name in layers for k in (1, 2, 3) if not name.endswith(".0") or k > 1}
    near = [hit for pattern in given for hit in difflib.get_close_matches(pattern, [*PRESETS, *sorted(endings)], n=3)]
    hint = f" Near: {', '.join(dict.fromkeys(near))}." if near else ""
    raise UserError(
        f"adapter.target: {', '.join(map(repr, given))} matches no linear or convolution layer of "
        f"{type(model).__name__}.{hint} Presets: {', '.join(PRESETS)}; or a list of module names or their endings; or "
        "one regular expression."
    )

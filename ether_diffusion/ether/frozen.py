"""A frozen layer: its sizes, how its weight is stored, and why no adapter can be attached or merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

ATTACH_FIRST = "offloading would miss the adapter. Attach first, then offload."


def layer_features(layer: nn.Module) -> tuple[int, int]:
    """Numbers of input and output features (channels of a convolution) of a layer that can be adapted."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    raise TypeError(f"Adapters here are for nn.Linear and nn.Conv2d, not {type(layer).__name__}.")


def layer_problem(
    name: str, layer: nn.Module, method: str, features: Sequence[int] = (), num_blocks: int = 1, narrowest: int = 1
) -> str | None:
    """Why a method cannot adapt a layer, or None if it can.

    Args:
        features: Numbers of features that it divides into `num_blocks` blocks, each at least `narrowest` wide.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return f"{name}: {method} adapts nn.Linear and nn.Conv2d, not {type(layer).__name__}."
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{name}: {method} does not adapt grouped convolutions (groups = {layer.groups})."
    if is_offloaded(layer):
        return f"{name} is offloaded: {ATTACH_FIRST}"
    for width in features:
        if width % num_blocks or width // num_blocks < narrowest:
            return f"{name}: {width} features do not divide into {num_blocks} blocks{at_least(narrowest)}."
    return None


def at_least(narrowest: int) -> str:
    """The end of a sentence on blocks: their least width."""
    return {1: "", 2: " at least two wide"}[narrowest]


def merge_problem(layer: nn.Module) -> str | None:
    """Why no adapter can be written into this layer's weight, or None if it can."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if is_offloaded(layer):
        return f"Cannot merge into an offloaded {type(layer).__name__}: its weight is not here. Merge, then offload."
    if not is_packed(layer):
        return None
    kind = str(weight.dtype) if kind == "Parameter" else f"{kind}, {weight.dtype}"
    return (
        f"Cannot merge into a weight of type {kind}: this {type(layer).__name__} is quantised. Generate without "
        "merging; or load the base unquantised and the same adapter into it, and merge there."
    )


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is quantised: the stored numbers are not those that the layer multiplies with.

    They are packed into integers (bitsandbytes), which may have a floating dtype (its `quant_storage`), or into a
    tensor that reports the dtype and shape of the unpacked weight (torchao).
    """
    weight: Any = layer.weight
    plain = type(weight.data) is Tensor and weight.is_floating_point()
    inputs, outputs = layer_features(layer)
    return not plain or tuple(weight.shape[:2]) != (outputs, inputs // getattr(layer, "groups", 1))


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a module's own weights are elsewhere between its calls, so that they must not be read here.

    accelerate leaves placeholders without memory. diffusers' group offloading to disk leaves memory of the right shape
    with arbitrary content.
    """
    if hasattr(layer, "_hf_hook") and any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return True
    return is_on_disk(layer)


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps the weights of this module's group on the disk."""
    hook = group_hook(module)
    return hook is not None and hook.group.offload_to_disk_path is not None


def group_hook(module: nn.Module) -> Any:
    """The hook of diffusers' group offloading, on modules or blocks of modules that it moves; or None."""
    hooks: Any = getattr(module, "_diffusers_hook", None)
    return None if hooks is None else hooks.get_hook("group_offloading")

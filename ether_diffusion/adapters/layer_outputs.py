"""What adapted layers do to one fixed input, each by itself: how much an adapter changes, if anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.ether.frozen import is_offloaded, layer_features
from ether_diffusion.randomness import generator

NOTHING = 1e-6
"""A change of a layer's outputs that is smaller than this share of their norm is single precision's rounding."""

T = TypeVar("T")


def spread(items: Sequence[T], most: int = 3) -> list[T]:
    """The first, the last, and those at equal distances between them: `most` of them, or all."""
    count = min(most, len(items))
    return [items[k * (len(items) - 1) // max(1, count - 1)] for k in range(count)]


def layers_with(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The layers that carry the adapter of this name, by their names in the model."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(name in getattr(module, key, ()) for key in module.adapter_layer_names)
    }


@torch.no_grad()
def outputs(layer: Any, index: int = 0) -> tuple[Tensor, Tensor] | None:
    """Outputs of the frozen layer and of the adapted one, with dropout off, for a random input that is always the same.

    Args:
        index: Of the input.

    Returns:
        The two, in single precision; None: the layer cannot be run by itself, because it is neither linear nor a
        convolution, or its weights are not here (offloaded, in shards, on the meta device).
    """
    base = layer.get_base_layer()
    here = all(is_here(tensor) for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors)
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or not here or is_offloaded(base):
        return None
    x = _fixed_input(base, index)
    with _evaluating(layer):
        try:
            return base(x).float(), layer(x).float()
        except Exception:  # hooks of other libraries, and methods that only PEFT knows, may need the model around it
            return None


def relative_change(layer: Any, index: int = 0) -> float | None:
    """How much the active adapter changes the layer's outputs, relative to their norm; None as `outputs`."""
    found = outputs(layer, index)
    if found is None:
        return None
    plain, adapted = found
    return float((adapted - plain).norm() / plain.norm().clamp_min(torch.finfo(torch.float32).tiny))


def changes_nothing(model: nn.Module, name: str = "default") -> bool:
    """Whether no layer's outputs change measurably with the adapter of this name, which is the active one.

    False where that cannot be found out, as with modules that are trained whole next to the adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    layers = layers_with(model, name)
    if not layers or getattr(configs.get(name), "modules_to_save", None):
        return False
    changes = (relative_change(layer) for layer in layers.values())
    return all(change is not None and change <= NOTHING for change in changes)


def _fixed_input(base: nn.Module, index: int) -> Tensor:
    """(4, in_features) for a linear layer, (1, in_channels, H, W) for a convolution."""
    weight: Any = base.weight
    features = layer_features(base)[0]
    shape: tuple[int, ...] = (4, features)
    if isinstance(base, nn.Conv2d):
        reach = [d * (k - 1) + 4 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        shape = (1, features, *reach)
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    x = torch.randn(shape, generator=generator(0, "layer-outputs", index))
    return x.to(weight.device, weight.dtype if is_plain else torch.float32)


def is_here(tensor: Tensor) -> bool:
    """Whether a tensor is whole and has values: DTensors and DeepSpeed's parameters are shards."""
    return not (tensor.is_meta or type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id"))


@contextlib.contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

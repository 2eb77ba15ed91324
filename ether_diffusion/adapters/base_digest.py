"""A digest of the base that an adapter belongs to: the same in training, in exports, and with an adapter in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.ether.frozen import is_offloaded, is_packed
from ether_diffusion.weight_files import weights_digest

from .attach import adapted_layers, saved_modules
from .layer_outputs import is_here
from .saved_adapter import previous_adapter


def base_digest(model: nn.Module, dtype: str | None = None) -> str | None:
    """The `weights_digest` of a part of a base, without the adapters in it.

    Args:
        dtype: Round the weights to this precision first, as `float16`: the one that another digest was computed in.

    Returns:
        The digest; None: the base's own weights are not here, because they are quantised, offloaded, in shards, or an
        adapter is merged into them.
    """
    recorded = getattr(model, "_base_digest", None)
    if recorded is not None and dtype in (None, recorded[0]):
        return recorded[1]
    weights = _base_weights(model)
    return None if weights is None else weights_digest(weights, getattr(torch, dtype) if dtype else None)


def record_base_digest(model: nn.Module) -> None:
    """Compute the digest, and keep it with the model: it is about to be quantised, merged into or sharded."""
    mark: Any = model
    mark._base_digest = dtype_of(model), base_digest(model)


def dtype_of(model: nn.Module) -> str:
    """The precision that `base_digest` computes in: that of the weights, when they were recorded or now."""
    recorded = getattr(model, "_base_digest", None)
    found = recorded[0] if recorded is not None else next(iter(model.parameters())).dtype
    return str(found).removeprefix("torch.")


def _base_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of the model that was there before adapters were attached, by its own names."""
    layers = adapted_layers(model)
    changed = previous_adapter(model) is not None or any(layer.merged_adapters for layer in layers.values())
    if changed or saved_modules(model) or any(map(_is_elsewhere, model.modules())):
        return None
    own = {id(tensor) for layer in layers.values() for tensor in _all_tensors(layer)}
    own -= {id(tensor) for layer in layers.values() for tensor in _all_tensors(layer.get_base_layer())}
    # Versions of transformers from 5.6 have no `text_model`.
    return {
        key.replace(".base_layer.", ".").removeprefix("text_model."): tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in own
    }


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether a module's weights are quantised or not here."""
    if is_offloaded(module) or (isinstance(module, nn.Linear | nn.Conv2d) and is_packed(module)):
        return True
    return not all(is_here(tensor) for tensor in module.parameters(recurse=False))

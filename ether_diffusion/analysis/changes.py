"""What a trained adapter does to each layer of a base: W, W' - W, and the distances of its transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.attach import detach
from ether_diffusion.adapters.storage import load_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherLayer
from ether_diffusion.ether import transform as T
from ether_diffusion.ether.layer import merge_problem


@dataclass(frozen=True)
class LayerChange:
    """One adapted layer, in double precision.

    Attributes:
        name: Of the module.
        weight: The base's, (out, in) or (out, in, kh, kw).
        change: W' - W, of the same shape.
        distances: ||T - I||_F of the transform on a side, `in` or `out`; empty for a method that has none.
    """

    name: str
    weight: Tensor
    change: Tensor
    distances: dict[str, float] = field(default_factory=dict)


def changes_of(unet: nn.Module, adapter: str | Path, device: str = "cpu") -> Iterator[LayerChange]:
    """The layers that a saved adapter changes, one after the other, so that one at a time is in memory.

    Args:
        unet: The base that the adapter was trained on. It carries the adapter while the iterator runs, and is as it was
            when it ends.
        adapter: A run folder, a checkpoint folder or a PEFT folder.
        device: Where the doubles are, and so where what follows is computed.

    Raises:
        UserError: as `load_adapter`; or a base weight is quantised or offloaded.
    """
    load_adapter(unet, adapter)
    try:
        yield from layer_changes(unet, device)
    finally:
        detach(unet)


def layer_changes(model: nn.Module, device: str = "cpu") -> Iterator[LayerChange]:
    """The same for a model that carries an adapter, which stays as it is.

    Each layer is copied in double precision and merged there: near the start of a training, W' - W is far smaller than
    the rounding of W' in single precision. ETHER's changes and distances are closed forms of its vectors.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            problem = merge_problem(layer.get_base_layer())
            if problem:
                raise UserError(f"{name}: {problem}")
            yield _change(name, layer, device)


@torch.no_grad()
def _change(name: str, layer: Any, device: str) -> LayerChange:
    double = copy.deepcopy(layer).to(device, torch.float64)
    (adapter,) = double.active_adapters
    distances = next((found(double, adapter) for kind, found in TRANSFORMS.items() if isinstance(double, kind)), {})
    weight = double.get_base_layer().weight.data
    if isinstance(double, EtherLayer):
        return LayerChange(name, weight, double.get_delta_weight(adapter), distances)
    before = weight.clone()
    double.merge()
    return LayerChange(name, before, double.get_base_layer().weight.data - before, distances)


def _ether(layer: Any, adapter: str) -> dict[str, float]:
    sides = {"in": layer.ether_in, "out": layer.ether_out}
    return {side: float(T.distance(planes[adapter]())) for side, planes in sides.items() if adapter in planes}


def _oft(layer: Any, adapter: str) -> dict[str, float]:
    rotation = layer.oft_R[adapter].get_weight()
    rotation.diagonal().sub_(1)
    return {"in": float(torch.linalg.matrix_norm(rotation))}


# The methods that transform a layer's input or output, by their layer class.
TRANSFORMS: dict[type, Callable[[Any, str], dict[str, float]]] = {EtherLayer: _ether, OFTLayer: _oft}

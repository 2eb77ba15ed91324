"""What a trained adapter changes in each layer of a base: W, W' - W, and the distances of its transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.hra.layer import HRALayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, detach
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS, MethodSettings
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherLayer
from ether_diffusion.ether import transform as T
from ether_diffusion.ether.frozen import merge_problem
from ether_diffusion.ether.weight_layer import WeightLayer
from ether_diffusion.generation import read_run
from ether_diffusion.input_files import check_file
from ether_diffusion.models.module_files import WEIGHTS, check_module
from ether_diffusion.models.saved_modules import UNET, SavedModule
from ether_diffusion.tuners import MagnitudeLayer, NaiveLayer


@dataclass(frozen=True)
class LayerChange:
    """One adapted layer, in double precision.

    Attributes:
        name: The module's name.
        weight: The base's weight, (out, in) or (out, in, kh, kw).
        change: W' - W, of the same shape.
        distances: ||T - I||_F of the transform on each side, `in` or `out`; empty for methods without transforms.
    """

    name: str
    weight: Tensor
    change: Tensor
    distances: dict[str, float] = field(default_factory=dict)


def changes_of(unet: nn.Module, run: str | Path, device: str = "cpu") -> Iterator[LayerChange]:
    """Iterate over the layers that a training changed; only one layer at a time is in memory in fp64.

    Args:
        unet: The base that the run was trained on. It may carry the adapter during the iteration, and is restored at
            its end.
        run: A run folder, a checkpoint folder, a PEFT folder, or a UNet's folder in diffusers' layout. For an adapter
            that was trained after another one, the change includes both, and there are no distances of transforms.
        device: The device of the fp64 tensors, and so of later computations.

    Raises:
        UserError: as `read_run` and `load_adapter`; a base weight is quantised or offloaded; or the run did not change
            the UNet's weights.
    """
    trained = read_run(run).trained
    if isinstance(trained, SavedModule):
        if trained.kind is not UNET:
            raise UserError(
                f"{trained.folder} is a {trained.kind.what}; its training did not change the base's weights."
            )
        yield from _of_whole_unet(unet, trained.folder, device)
    elif trained.before is not None:
        yield from _of_later_phase(unet, trained, device)
    else:
        load_adapter(unet, trained)
        try:
            yield from layer_changes(unet, device)
        finally:
            detach(unet)


def _of_whole_unet(unet: nn.Module, folder: Path, device: str) -> Iterator[LayerChange]:
    check_module(unet, folder, UNET.what)
    check_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:  # one tensor at a time: the file is as large as the base
        for name, weight in _weights(unet, device):
            after = file.get_tensor(f"{name}.weight").to(device, torch.float64)
            yield LayerChange(name, weight, after - weight)


def _of_later_phase(unet: nn.Module, trained: SavedAdapter, device: str) -> Iterator[LayerChange]:
    adapted = copy.deepcopy(unet)  # earlier adapters are merged for good
    load_adapter(adapted, trained)
    for name, weight in _weights(unet, device):
        layer: Any = adapted.get_submodule(name)
        if isinstance(layer, BaseTunerLayer):
            last = _change(name, layer, device)
            yield LayerChange(name, weight, last.weight + last.change - weight)
        elif not torch.equal(after := layer.weight.detach().to(device, torch.float64), weight):
            yield LayerChange(name, weight, after - weight)


def _weights(unet: nn.Module, device: str) -> Iterator[tuple[str, Tensor]]:
    """Names of modules and weights of linear layers and convolutions, in fp64."""
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield name, module.weight.detach().to(device, torch.float64)


def layer_changes(model: nn.Module, device: str = "cpu") -> Iterator[LayerChange]:
    """As `changes_of`, for a model that carries an adapter and is not changed.

    Each layer is copied and merged in fp64: early in training, W' - W is far smaller than the rounding error of W' in
    fp32. ETHER's changes and distances are closed forms of its vectors, without a transform or a subtraction.
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
    if isinstance(double, WeightLayer):
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
    return {"in": _norm(rotation)}


def _boft(layer: Any, adapter: str) -> dict[str, float]:
    rotation, scales = layer.get_delta_weight(adapter)
    return {"in": _from_identity(rotation), "out": _norm(scales - 1)}


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _from_identity(matrix: Tensor) -> float:
    return _norm(matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


# Methods that transform a layer's input or output, by layer class.
TRANSFORMS: dict[type, Callable[[Any, str], dict[str, float]]] = {
    EtherLayer: _ether,
    OFTLayer: _oft,
    BOFTLayer: _boft,
    HRALayer: lambda layer, adapter: {"in": _from_identity(layer.get_delta_weight(adapter))},
    NaiveLayer: lambda layer, adapter: {"in": _norm(layer.naive_blocks[adapter]())},
    MagnitudeLayer: lambda layer, adapter: {"out": _norm(layer.magnitude_rows[adapter]())},  # s - 1
}


def changes_at_start(unet: nn.Module, run: str | Path, device: str = "cpu") -> Iterator[LayerChange]:
    """Iterate over the layers that were changed before the first training step; none if training started at the base.

    They were changed by the adapter of `adapter.init_from`; by a previous adapter, which is merged; or by the method's
    initialisation, such as ETHER's, whose reflections are never the identity. It is repeated from the run's seed.

    Args:
        unet, device: As for `changes_of`.
        run: A run folder or a checkpoint folder of one.

    Raises:
        UserError: as `read_run`; the run's config is missing or of another version; or the adapter of
            `adapter.init_from` is gone.
    """
    saved = read_run(run)
    adapter: dict[str, Any] = saved.config.get("adapter") or {}
    if adapter.get("init_from"):
        try:
            yield from changes_of(unet, adapter["init_from"], device)
        except UserError as error:
            raise UserError(f"adapter.init_from: {error}") from error
    elif isinstance(saved.trained, SavedAdapter) and saved.trained.before is not None:
        yield from changes_of(unet, saved.trained.before.folder, device)
    elif not (settings := _settings(run, adapter)).starts_at_base:
        attach(unet, settings, saved.config.get("seed") or 0)
        try:
            yield from layer_changes(unet, device)
        finally:
            detach(unet)


def _settings(run: str | Path, adapter: dict[str, Any]) -> MethodSettings:
    method = METHODS.get(adapter.get("method", ""))
    if method is None:
        raise UserError(f"{run}: no config.yaml that names a method; the start of the training is unknown.")
    try:
        return method.model_validate(adapter)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(f"{run}: config.yaml: adapter.{where}: {fault['msg']}.") from error

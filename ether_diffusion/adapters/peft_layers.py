"""Repairs of PEFT's own layers, so that they are attached, scaled, saved and loaded like ETHER's."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn

from ether_diffusion.errors import UserError

# How far inside COFT's ball a block is projected, so that rounding leaves it inside.
_MARGIN = 1e-5


def replace_layers(model: nn.Module, config: PeftConfig, name: str) -> None:
    """Replace the target layers of a bare model by the method's, with the adapter `name` in them.

    Raises:
        ValueError: PEFT refuses the settings or a layer.
    """
    kind: Any = config.peft_type
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    try:
        with warnings.catch_warnings():
            # BOFT warns, for every layer, of an extension that one butterfly factor does not need; HRA of an odd rank;
            # PEFT of a second adapter, which has a name of its own here.
            warnings.filterwarnings(
                "ignore",
                "Failed to load the CUDA extension|Setting boft_n|The symmetric init|Already found a `peft_config`",
            )
            if tuner.uses_shared_state:
                # `inject_adapter_in_model` refuses these: it drops the tuner that owns the state. Layers have it, too.
                tuner(model, config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, name)
    except (TypeError, NotImplementedError) as error:  # PEFT's errors for a layer that it does not adapt
        raise ValueError(str(error)) from error


def keep_fp32(model: nn.Module, name: str) -> None:
    """Convert an adapter's parameters from half precision, which PEFT takes from the base, to fp32."""
    for layer in _layers_with(model, name):
        for key, parameter in layer.named_parameters():
            if "base_layer." not in key and f".{name}" in key:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def refuse_scales(model: nn.Module, name: str, method: str, has_scale: bool) -> None:
    """Make the layers of the adapter `name` refuse any scale but 1 in one line, where its method has no scale.

    diffusers calls these functions. PEFT's layers without a scale lack them, fail in them, or merely warn.
    """
    for layer in _layers_with(model, name):
        if not has_scale or not isinstance(getattr(layer, "scaling", None), dict):
            layer.set_scale = functools.partial(_refuse_adapter_scale, method)
            layer.scale_layer = layer.unscale_layer = functools.partial(_refuse_scale, method)


def _layers_with(model: nn.Module, name: str) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and any(
            name in getattr(module, key) for key in module.adapter_layer_names
        ):
            yield module


def _refuse_scale(method: str, scale: float | None = None) -> None:
    if scale not in (None, 1):
        raise UserError(f"scale: {scale:g}, but {method} is defined as trained only; allowed: 1.")


def _refuse_adapter_scale(method: str, adapter: str, scale: float) -> None:
    _refuse_scale(method, scale)


def at_least_single(model: nn.Module) -> None:
    """Convert the frozen buffers that adapters compute with to fp32, if they are in half precision."""
    for module in model.modules():
        if isinstance(module, BufferDict):
            tensors: dict[str, Tensor] = dict(module.items())  # pyright: ignore[reportAssignmentType] - none is None
            for key, tensor in tensors.items():
                module[key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def vera_projections(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The projections that all layers of a VeRA adapter share, by the keys that a `PeftModel` has for them."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, VeraLayer) and name in layer.vera_A:
            return {f"base_model.vera_A.{name}": layer.vera_A[name], f"base_model.vera_B.{name}": layer.vera_B[name]}
    return {}


def reflections_low_rank(weight: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
    """HRA's `W H_1 … H_r - W` as factors (B, A): one rank a reflection, since `R H = R - 2 (R u) u^T`.

    Args:
        weight: (out, in) or (out, in, kh, kw).
        normals: (in kh kw, r), of any length.
    """
    units = normals / normals.norm(dim=0)
    rows, ups = weight.flatten(1).to(units.dtype), []
    for u in units.T:
        up = -2 * (rows @ u)
        rows = rows + torch.outer(up, u)
        ups.append(up)
    return torch.stack(ups, dim=1), units.T.reshape(-1, *weight.shape[1:])


def constrain(model: nn.Module, eps: float, name: str) -> None:
    """Make an OFT adapter a constrained one (COFT): its Q is projected onto the ball in every forward pass.

    Args:
        eps: As in OFT's code. There, a block of width b of n has the bound eps b^2 / sqrt(n); PEFT leaves b^2 out.
    """
    for rotation in _rotations(model, name):
        rotation.coft, rotation.eps = True, eps * rotation.block_size**2
        module: Any = rotation
        module._project_batch = functools.partial(_project, rotation)  # pickle cannot find a bound method


def project_rotations(model: nn.Module, name: str) -> None:
    """Project the blocks of a constrained adapter onto their balls, as the next forward pass would."""
    with torch.no_grad():
        for rotation in _rotations(model, name):
            if rotation.coft:
                rotation.weight.copy_(rotation._project_batch(rotation.weight, eps=rotation.eps))


def _rotations(model: nn.Module, name: str) -> Iterator[OFTRotationModule]:
    for module in model.modules():
        if isinstance(module, OFTLayer) and name in module.oft_R:
            yield module.oft_R[name]  # pyright: ignore[reportReturnType]


def _project(self: OFTRotationModule, Q: Tensor, eps: float) -> Tensor:  # noqa: N803 - the paper's name, and PEFT's
    """Replaces PEFT's projection, whose result may be outside by rounding, and change when it is projected again.

    A block inside the ball stays as it is, bit for bit, so that a resumed run equals one that was never stopped.
    """
    bound = eps / math.sqrt(Q.shape[0])
    norms = math.sqrt(2) * Q.norm(dim=1, keepdim=True)  # Q holds the upper half of skew matrices, (num_blocks, entries)
    return torch.where(norms <= bound, Q, Q * ((1 - _MARGIN) * bound / norms.clamp(min=bound)))


def butterflies() -> bool:
    """Whether PEFT's CUDA extension for BOFT's butterflies is there, or can be compiled."""
    from peft.tuners.boft.layer import get_fbd_cuda

    return torch.cuda.is_available() and get_fbd_cuda() is not None

"""What PEFT's own layers lack where they are to be attached, scaled, saved and loaded like ETHER's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.hra.layer import HRALayer
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn

from ether_diffusion.errors import UserError

# How much inside COFT's ball a block lands that is put back into it, so that rounding leaves it inside.
_MARGIN = 1e-5
_ROTATIONS = (OFTLayer, BOFTLayer, HRALayer)


def put_in(model: nn.Module, config: PeftConfig, name: str) -> None:
    """Replace the target layers of a bare model by the method's, with the adapter `name` in them.

    Raises:
        ValueError: PEFT refuses the settings or a layer.
    """
    kind: Any = config.peft_type
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    try:
        with warnings.catch_warnings():
            # BOFT's, for every layer, of an extension that one butterfly factor does without; HRA's, of an odd rank;
            # and that there is another adapter: here every adapter has been given a name.
            warnings.filterwarnings(
                "ignore",
                "Failed to load the CUDA extension|Setting boft_n|The symmetric init|Already found a `peft_config`",
            )
            if tuner.uses_shared_state:
                # `inject_adapter_in_model` lets the tuner go, which owns VeRA's projections. Each layer has them, too.
                tuner(model, config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, name)
    except (TypeError, NotImplementedError) as error:  # how PEFT says that it does not adapt such a layer
        raise ValueError(str(error)) from error
    for module in model.modules():
        if isinstance(module, _ROTATIONS):
            _keep_single(module, name)
        if isinstance(module, BaseTunerLayer) and not has_scale(module, name):
            layer: Any = module
            layer.set_scale = MethodType(_set_scale, layer)
            layer.scale_layer = layer.unscale_layer = MethodType(_refuse, layer)


def has_scale(layer: BaseTunerLayer, name: str = "default") -> bool:
    """Whether a layer can be anywhere between its base (0) and its adapter as trained (1)."""
    # At scale 0 DoRA's rows would still have the lengths that were trained.
    dora = getattr(layer, "use_dora", {}).get(name, False)
    return isinstance(getattr(layer, "scaling", None), dict) and not dora


# In the place of what PEFT's layers have: nothing, an AttributeError, or a mere warning. diffusers calls these.
def _refuse(self: nn.Module, scale: float | None = None) -> None:
    if scale not in (None, 1):
        kind = {"lora": "dora"}.get(package := type(self).__module__.split(".")[-2], package)
        raise UserError(f"scale: {scale:g}, but {kind} is defined as trained only; allowed: 1.")


def _set_scale(self: nn.Module, adapter: str, scale: float) -> None:
    _refuse(self, scale)


def _keep_single(layer: nn.Module, name: str) -> None:
    """PEFT rounds an adapter to its base's precision. Rotations of half precision are none."""
    for key, parameter in layer.named_parameters():
        if "base_layer." not in key and f".{name}" in key:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def check_sequential_offload(config: PeftConfig) -> None:
    """accelerate brings an offloaded weight back for the module that owns it, when that module is called.

    Raises:
        UserError: this method's layers read weights of modules that they do not call.
    """
    kind = "DORA" if getattr(config, "use_dora", False) else getattr(config.peft_type, "value", config.peft_type)
    if kind in ("DORA", "BOFT", "HRA", "VERA", "DELORA"):
        raise UserError(
            f"--offload sequential: {kind.lower()} reads weights while they are away. Take --offload model, or --merge."
        )


def at_least_single(model: nn.Module) -> None:
    """Have the frozen numbers that adapters compute with in no less precision than the trained ones."""
    for module in model.modules():
        if isinstance(module, BufferDict):
            tensors: dict[str, Tensor] = dict(module.items())  # pyright: ignore[reportAssignmentType] - none is None
            for key, tensor in tensors.items():
                module[key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def shared_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What all layers of an adapter share, VeRA's projections, by the keys that a `PeftModel` has for it."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, VeraLayer) and name in layer.vera_A:
            return {f"base_model.vera_A.{name}": layer.vera_A[name], f"base_model.vera_B.{name}": layer.vera_B[name]}
    return {}


def is_frozen(key: str) -> bool:
    """Whether a tensor of a saved adapter is not trained: VeRA's projections, the base's norms of DeLoRA."""
    return key.startswith("base_model.vera_") or key.endswith(".delora_w_norm")


def constrain(model: nn.Module, eps: float, name: str) -> None:
    """Make an OFT adapter a constrained one (COFT): its Q is put back into the ball in every forward pass.

    Args:
        eps: As in OFT's code. There, a block of width b of n has the bound eps b^2 / sqrt(n); PEFT leaves b^2 out.
    """
    for rotation in _rotations(model, name):
        rotation.coft, rotation.eps = True, eps * rotation.block_size**2
        module: Any = rotation
        module._project_batch = MethodType(_project, rotation)


def project(model: nn.Module, name: str) -> None:
    """Put the blocks of a constrained adapter into their balls, as the next forward pass would."""
    with torch.no_grad():
        for rotation in _rotations(model, name):
            if rotation.coft:
                rotation.weight.copy_(rotation._project_batch(rotation.weight, eps=rotation.eps))


def _rotations(model: nn.Module, name: str) -> Iterator[OFTRotationModule]:
    for module in model.modules():
        if isinstance(module, OFTLayer) and name in module.oft_R:
            yield module.oft_R[name]  # pyright: ignore[reportReturnType]


def _project(self: OFTRotationModule, Q: Tensor, eps: float) -> Tensor:  # noqa: N803 - the paper's name, and PEFT's
    """In the place of PEFT's projection, whose result may be outside by its rounding and move when projected again.

    What is inside stays, bit for bit. So a run goes on alike from what was saved and from what was not.
    """
    bound = eps / math.sqrt(Q.shape[0])
    norms = math.sqrt(2) * Q.norm(dim=1, keepdim=True)  # Q holds the upper half of skew matrices, (num_blocks, entries)
    return torch.where(norms <= bound, Q, Q * ((1 - _MARGIN) * bound / norms.clamp(min=bound)))


def butterflies() -> bool:
    """Whether PEFT's CUDA extension for BOFT's butterflies is there, or can be compiled."""
    from peft.tuners.boft.layer import get_fbd_cuda

    return torch.cuda.is_available() and get_fbd_cuda() is not None

"""The private names of PEFT that this package relies on, since any release may change them.

Each failure names the function to mend. Public names need no such test: PEFT deprecates those before it drops them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import peft.tuners.boft.layer
import peft.tuners.tuners_utils
import pytest
import torch
from peft import OFTConfig, VeraConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.vera import VeraModel
from torch import nn

LAYER, MODEL = "ether/weight_layer.py: WeightLayer", "ether/weight_model.py: WeightModel"
LAYERS = "adapters/peft_layers.py:"

SIGNATURES: list[tuple[Any, str, list[str], str]] = [
    (BaseTuner, "_prepare_model", ["self", "peft_config", "model"], f"{MODEL}._prepare_model, which overrides it"),
    (
        BaseTuner,
        "_create_and_replace",
        ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"],
        f"{MODEL}._create_and_replace, which implements it",
    ),
    (
        BaseTuner,
        "_replace_module",
        ["self", "parent", "child_name", "new_module", "child"],
        f"{MODEL}._create_and_replace, which calls it",
    ),
    (
        peft.PeftModel,
        "_enable_peft_forward_hooks",
        ["self", "args", "kwargs"],
        f"{MODEL}._enable_peft_forward_hooks, which it calls",
    ),
    (
        BaseTuner,
        "_cast_adapter_dtype",
        ["self", "adapter_name", "autocast_adapter_dtype"],
        f"{MODEL}._cast_adapter_dtype, which overrides it",
    ),
    (
        BaseTuner,
        "_get_adapter_state_dict",
        ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
        f"{MODEL}._get_adapter_state_dict, which overrides it",
    ),
    (
        BaseTunerLayer,
        "_get_base_layer_device_and_dtype",
        ["self", "base_layer"],
        f"{LAYER}.update_layer and store_in_base_dtype, which call it",
    ),
    (
        peft.tuners.tuners_utils,
        "_maybe_include_all_linear_layers",
        ["peft_config", "model"],
        f"{MODEL}._prepare_model, which calls it",
    ),
    (OFTRotationModule, "_project_batch", ["self", "Q", "eps"], f"{LAYERS} constrain, which replaces it"),
    (peft.tuners.boft.layer, "get_fbd_cuda", [], f"{LAYERS} butterflies, which calls it"),
]


def check(holds: bool, what: str, mend: str) -> None:
    if not holds:
        pytest.fail(f"peft {peft.__version__}: {what}. Mend ether_diffusion/{mend}.")


@pytest.mark.parametrize(("owner", "name", "parameters", "mend"), SIGNATURES, ids=[name for _, name, *_ in SIGNATURES])
def test_private_functions_have_the_parameters_that_are_relied_on(
    owner: Any, name: str, parameters: list[str], mend: str
) -> None:
    function: Callable[..., Any] | None = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    check(function is not None, f"{where} is gone", mend)
    assert function is not None
    found = list(inspect.signature(function).parameters)
    check(found == parameters, f"{where} has the parameters {found}, not {parameters}", mend)


def test_the_device_and_dtype_of_a_layer_come_as_a_pair() -> None:
    found = BaseTunerLayer._get_base_layer_device_and_dtype(None, nn.Linear(2, 2).half())  # pyright: ignore
    expected = (torch.device("cpu"), torch.float16)
    mend = f"{LAYER}.update_layer and store_in_base_dtype"
    check(found == expected, f"BaseTunerLayer._get_base_layer_device_and_dtype returns {found}, not {expected}", mend)


@pytest.mark.parametrize(
    ("private", "public", "value"),
    [("_active_adapter", "active_adapter", "a"), ("_disable_adapters", "disable_adapters", True)],
)
def test_a_layers_state_is_in_these_attributes(private: str, public: str, value: Any) -> None:
    class Layer(nn.Module, BaseTunerLayer):
        pass

    layer = Layer()
    setattr(layer, private, value)
    check(getattr(layer, public) == value, f"BaseTunerLayer.{public} does not read {private}", f"{LAYER}.__init__")


def test_all_linear_layers_are_filled_in() -> None:
    config = OFTConfig(target_modules="all-linear")
    peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    check(
        config.target_modules == {"0"},
        f"_maybe_include_all_linear_layers gave {config.target_modules}, not {{'0'}}",
        f"{MODEL}._prepare_model",
    )


def test_constrained_oft_projects_in_its_forward_pass() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), OFTConfig(r=2, oft_block_size=0, target_modules=["0"]))
    layer: Any = model.base_model.model[0]  # pyright: ignore
    rotation = layer.oft_R["default"]
    called: list[float] = []

    def project(Q: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: N803 - PEFT's name
        called.append(eps)
        return Q

    rotation.coft, rotation.eps, rotation._project_batch = True, 0.25, project
    model(torch.randn(1, 8))
    mend = f"{LAYERS} constrain and project_rotations"
    check(called == [0.25], "an OFTRotationModule with coft does not call _project_batch(weight, eps=self.eps)", mend)
    shapes = (rotation.block_size, tuple(rotation.weight.shape))
    check(shapes == (4, (2, 6)), f"OFTRotationModule's block_size and weight are {shapes}, not (4, (2, 6))", mend)


def test_vera_shares_its_projections_in_a_dictionary_of_buffers() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(r=2, target_modules=["0"]))
    layer: Any = model.base_model.model[0]  # pyright: ignore
    kept = isinstance(layer.vera_A, BufferDict) and isinstance(layer.vera_B, BufferDict)
    check(kept, "VeRA's vera_A and vera_B are no BufferDict", f"{LAYERS} at_least_single and vera_projections")
    shared = layer.vera_A["default"] is model.base_model.vera_A["default"]  # pyright: ignore
    check(shared, "a VeRA layer holds other projections than its model", f"{LAYERS} vera_projections")
    check(VeraModel.uses_shared_state, "VeraModel.uses_shared_state is not set", f"{LAYERS} replace_layers")

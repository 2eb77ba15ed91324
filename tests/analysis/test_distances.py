"""Distances of adapters: closed forms equal dense matrices, bounds hold, small changes keep their precision."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from peft import OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import attach, inject
from ether_diffusion.adapters.loading import load_adapter, merge_saved
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saved_adapter import read_previous_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.analysis.changes import LayerChange, changes_of, layer_changes
from ether_diffusion.analysis.geometry import distance_of, distances, mean_distance
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.saved_modules import CONTROLNET, UNET, save_whole_module
from ether_diffusion.tuners import MagnitudeConfig, NaiveConfig
from support.dense import matrix_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def moved(unet: Any, config: Any, size: float = 0.3) -> Any:
    """The UNet with an adapter that is not at its initialisation."""
    inject(unet, config, "default")
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    return unet


def apart(matrix: Tensor) -> float:
    return float((matrix.detach() - torch.eye(len(matrix), dtype=matrix.dtype)).norm())


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize(("variant", "sides"), [("ether", "in"), ("ether_plus", "in"), ("ether_plus", "both")])
def test_ethers_closed_forms_equal_dense_matrices(unet: Any, variant: Any, sides: Any, num_blocks: int) -> None:
    config = EtherConfig(variant=variant, sides=sides, num_blocks=num_blocks, target_modules=[*ATTENTION, "conv1"])
    for change in layer_changes(moved(unet, config)):
        layer: Any = unet.get_submodule(change.name)
        t_in = matrix_of(layer.ether_in["default"])
        expected = {"in": apart(t_in)}
        weight = layer.get_base_layer().weight.double()
        adapted = torch.einsum("oi...,ij->oj...", weight, t_in)
        if sides == "both":
            t_out = matrix_of(layer.ether_out["default"])
            expected["out"] = apart(t_out)
            adapted = torch.einsum("po,oj...->pj...", t_out, adapted)
        assert change.distances == pytest.approx(expected, rel=1e-12)
        assert torch.equal(change.weight, weight)
        assert torch.allclose(change.change, adapted - weight, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_ether_is_at_2_sqrt_n_and_ether_plus_within_sqrt_2n(unet: Any, num_blocks: int, size: float) -> None:
    """However long the vectors are."""
    other = copy.deepcopy(unet)
    fixed = moved(unet, EtherConfig(variant="ether", num_blocks=num_blocks, target_modules=ATTENTION), size)
    bounded = moved(other, EtherConfig(variant="ether_plus", num_blocks=num_blocks, target_modules=ATTENTION), size)
    for row in distances(layer_changes(fixed)):
        assert row.transform_in == pytest.approx(2 * math.sqrt(num_blocks), rel=1e-12)
    for row in distances(layer_changes(bounded)):
        assert max(row.transform_in, row.transform_out) <= math.sqrt(2 * num_blocks) * (1 + 1e-12)


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_ofts_rotation_is_within_2_sqrt_features_and_rotates_the_weight(unet: Any, size: float) -> None:
    config = OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=ATTENTION)
    for change in layer_changes(moved(unet, config, size)):
        rotated = change.weight + change.change
        features = rotated.shape[1]
        assert 0 < change.distances["in"] < 2 * math.sqrt(features)
        assert torch.allclose(rotated @ rotated.mT, change.weight @ change.weight.mT, atol=1e-12)
        layer: Any = unet.get_submodule(change.name)
        assert change.distances["in"] == pytest.approx(apart(layer.oft_R["default"].get_weight().double()), rel=1e-4)


def test_naives_distance_is_that_of_its_blocks(unet: Any) -> None:
    for change in layer_changes(moved(unet, NaiveConfig(num_blocks=4, target_modules=ATTENTION))):
        layer: Any = unet.get_submodule(change.name)
        factor = torch.linalg.lstsq(change.weight, change.weight + change.change).solution
        if change.weight.shape[0] >= change.weight.shape[1]:  # otherwise W R does not determine R
            assert change.distances["in"] == pytest.approx(apart(factor), rel=1e-9)
        assert set(change.distances) == {"in"}
        assert layer.in_features == change.weight.shape[1]


@pytest.mark.parametrize(
    ("method", "settings"), [("hra", {"rank": 1}), ("hra", {"rank": 6}), ("boft", {}), ("magnitude", {})]
)
def test_distances_are_those_of_the_transforms_between_w_and_its_change(unet: Any, method: str, settings: Any) -> None:
    """W' = diag(s) W T, solved for s and T: T keeps the lengths of rows, so s is the change of these lengths."""
    attach(unet, METHODS[method](target=[*ATTENTION, "proj_in"], **settings))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    solved = 0
    for change in layer_changes(unet):
        before, after = (weight.flatten(1) for weight in (change.weight, change.weight + change.change))
        scales = after.norm(dim=1, keepdim=True) / before.norm(dim=1, keepdim=True)
        expected = {"in": math.nan, "out": float((scales - 1).norm())}
        if before.shape[0] >= before.shape[1]:  # otherwise W T does not determine T
            expected["in"], solved = apart(torch.linalg.lstsq(before, after / scales).solution), solved + 1
        sides = {"hra": ["in"], "boft": ["in", "out"], "magnitude": ["out"]}[method]
        assert list(change.distances) == sides
        for side in sides:
            assert math.isnan(expected[side]) or change.distances[side] == pytest.approx(expected[side], rel=1e-6)
        if method == "hra":
            assert change.distances["in"] <= 2 * math.sqrt(settings["rank"]) * (1 + 1e-12)
    assert solved > 0


def test_one_householder_reflection_is_at_ethers_distance(unet: Any) -> None:
    attach(unet, METHODS["hra"].model_validate({"rank": 1}))
    assert all(change.distances == {"in": pytest.approx(2, rel=1e-12)} for change in layer_changes(unet))


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if getattr(entry, "peft_type", "")])
def test_the_adapted_layer_computes_with_the_changed_weight(unet: Any, method: str) -> None:
    """For every method: the layer's forward pass multiplies with W'."""
    small: dict[str, Any] = {"rank": 4} if method == "vera" else {}
    attach(unet, METHODS[method](**small))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    double = copy.deepcopy(unet).double()
    found = list(layer_changes(unet))
    assert len(found) == sum(isinstance(module, BaseTunerLayer) for module in unet.modules()) > 0
    for change in found[::5]:
        layer: Any = double.get_submodule(change.name)
        x = torch.randn(3, change.weight.shape[1], dtype=torch.float64)
        expected = F.linear(x, change.weight + change.change, layer.get_base_layer().bias)
        assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert change.change.norm() > 1e-4


def test_a_change_far_below_the_rounding_error_of_the_weight_keeps_its_precision(unet: Any) -> None:
    inject(unet, EtherConfig(variant="ether_plus", sides="in", target_modules=ATTENTION), "default")
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    planes = layer.ether_in["default"]
    planes.double()
    across = torch.linalg.svd(planes.u.double()).Vh[1:2]
    planes.v.data += 1e-11 * planes.u.norm() * across
    row = distance_of(next(change for change in layer_changes(unet) if change.name.endswith("attn1.to_q")))
    assert row.transform_in == pytest.approx(math.sqrt(2) * 1e-11, rel=1e-4)
    assert 0 < row.weight < 1e-10


def test_means_are_over_all_transforms_and_all_layers() -> None:
    weight = torch.eye(2, dtype=torch.float64)
    rows = [
        distance_of(LayerChange("a", weight, 3 * weight, {"in": 1.0, "out": 3.0})),
        distance_of(LayerChange("b", weight, 0 * weight, {"in": 5.0})),
    ]
    mean = mean_distance(rows)
    assert mean.transform == 3
    assert mean.weight == pytest.approx(1.5 * math.sqrt(2))
    assert mean.relative == pytest.approx(1.5)
    assert math.isnan(mean_distance([distance_of(LayerChange("c", weight, weight))]).transform)


def test_a_base_is_restored_after_its_adapter_was_analysed(finished_run: Path) -> None:
    unet = load_base("tiny").unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    found = list(changes_of(unet, finished_run))
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    load_adapter(unet, finished_run)
    assert [change.name for change in found] == [n for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)]


def test_every_weight_of_a_whole_unet_is_compared(unet: Any, tmp_path: Path) -> None:
    trained = copy.deepcopy(unet)
    trained.conv_in.weight.data += 0.5
    trained.mid_block.attentions[0].proj_in.weight.data *= 2
    save_whole_module(trained, tmp_path / "run/unet", UNET, base_model="a base")
    norms = {change.name: float(change.change.norm()) for change in changes_of(unet, tmp_path / "run")}
    assert len(norms) == sum(isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) for module in unet.modules())
    assert {name: norm for name, norm in norms.items() if norm} == pytest.approx(
        {
            "conv_in": 0.5 * math.sqrt(unet.conv_in.weight.numel()),
            "mid_block.attentions.0.proj_in": float(unet.mid_block.attentions[0].proj_in.weight.norm()),
        }
    )


def test_a_controlnet_does_not_change_its_base(unet: Any, tmp_path: Path) -> None:
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    save_whole_module(controlnet, tmp_path / "controlnet", CONTROLNET, base_model="a base")
    with pytest.raises(UserError, match="is a ControlNet; its training did not change the base's weights"):
        next(changes_of(unet, tmp_path))


def test_the_change_of_a_second_phase_includes_both_phases(unet: Any, tmp_path: Path) -> None:
    """OFT on queries, then magnitudes of keys: W' is R's on the former and diag(s) W on the latter."""
    first = moved(
        copy.deepcopy(unet), OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["to_q"])
    )
    save_adapter(first, tmp_path / "first", base_model="a base")
    rotations = {change.name: change.change for change in layer_changes(first)}
    second = copy.deepcopy(unet)
    merge_saved(second, read_previous_adapter(tmp_path / "first"))
    moved(second, MagnitudeConfig(target_modules=["to_k"]))
    save_adapter(second, tmp_path / "second", base_model="a base")

    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    found = {change.name: change for change in changes_of(unet, tmp_path / "second")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert {name.rpartition(".")[2] for name in found} == {"to_q", "to_k"}
    for name, change in found.items():
        if name.endswith("to_q"):
            expected = rotations[name]
        else:
            scales = second.get_submodule(name).magnitude_rows["default"]()
            expected = scales.double()[:, None] * unet.get_submodule(name).weight.double()
        assert torch.allclose(change.change, expected, atol=1e-6)

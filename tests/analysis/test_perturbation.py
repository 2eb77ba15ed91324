"""Random transforms have the requested kind and distance, and are removed at the end of the block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ether_diffusion.analysis.perturbation import PERTURBATIONS, authors_weight, oft_bound, perturbed
from ether_diffusion.analysis.perturbation_report import Trial, pixel_distance, plan, possible_distances, sweep
from ether_diffusion.errors import UserError
from ether_diffusion.ether import transform as T
from ether_diffusion.randomness import generator

LAYERS = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in", "conv_in"]


def sampled(method: str, features: int, blocks: int, distance: float) -> Tensor:
    """A random T as a matrix."""
    change = PERTURBATIONS[method].sample(features, blocks, distance, generator(0, "test"))
    assert float(T.distance(change)) == pytest.approx(distance, rel=1e-9)
    return torch.eye(features, dtype=torch.float64) + T.apply_change(change, torch.eye(features, dtype=torch.float64))


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("distance", [1e-6, 0.1, 1.0, 5.0, 9.7])
def test_ofts_transforms_are_rotations_in_blocks_at_the_distance(blocks: int, distance: float) -> None:
    rotation = sampled("oft", 24, blocks, distance)
    identity = torch.eye(24, dtype=torch.float64)
    assert torch.allclose(rotation @ rotation.mT, identity, atol=1e-10)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1)
    assert float((rotation - identity).norm()) == pytest.approx(distance, rel=1e-6)
    outside = torch.block_diag(*[torch.ones(24 // blocks, 24 // blocks)] * blocks) == 0
    assert not rotation[outside].any()


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("part", [1e-6, 0.3, 1.0])
def test_ether_plus_has_two_hyperplanes_at_the_angle_of_the_distance(blocks: int, part: float) -> None:
    distance = part * math.sqrt(2 * blocks)
    transform = sampled("ether_plus", 24, blocks, distance)
    change = transform - torch.eye(24, dtype=torch.float64)
    assert torch.allclose(change, change.mT, atol=1e-15)
    # v v^T - u u^T has the eigenvalues ± sine of the angle in each block, and no other.
    eigenvalues = torch.linalg.eigvalsh(change)
    sine = distance / math.sqrt(2 * blocks)
    expected = torch.tensor([-sine] * blocks + [0.0] * (24 - 2 * blocks) + [sine] * blocks, dtype=torch.float64)
    assert torch.allclose(eigenvalues, expected, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 4])
def test_ethers_transforms_are_reflections_at_one_distance(blocks: int) -> None:
    reflection = sampled("ether", 24, blocks, 2 * math.sqrt(blocks))
    assert torch.allclose(reflection @ reflection, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert float(torch.linalg.det(reflection)) == pytest.approx((-1) ** blocks)
    with pytest.raises(UserError, match="not 1"):
        sampled("ether", 24, blocks, 1.0)


@pytest.mark.parametrize(
    ("method", "features", "blocks", "bound"),
    [("oft", 24, 1, 2 * math.sqrt(24)), ("oft", 27, 3, 2 * math.sqrt(24)), ("ether_plus", 24, 4, math.sqrt(8))],
)
def test_distances_beyond_a_methods_bound_are_refused(method: str, features: int, blocks: int, bound: float) -> None:
    assert PERTURBATIONS[method].bound(features, blocks) == pytest.approx(bound)
    sampled(method, features, blocks, bound * 0.999)
    with pytest.raises(UserError, match="expected 0 to"):
        sampled(method, features, blocks, bound * 1.001)
    with pytest.raises(UserError, match="expected 0 to"):
        sampled(method, features, blocks, -0.1)


@pytest.mark.parametrize("method", ["oft", "ether_plus"])
def test_a_sample_keeps_its_directions_at_growing_distances(method: str) -> None:
    identity = torch.eye(24, dtype=torch.float64)
    near, far = (sampled(method, 24, 1, distance) - identity for distance in (1e-5, 2e-5))
    assert torch.allclose(far, 2 * near, atol=1e-9)


@pytest.mark.parametrize(("method", "distance"), [("oft", 3.0), ("ether", 2.0), ("ether_plus", 1.2)])
def test_a_perturbed_layer_has_the_transformed_weight_and_then_its_own(unet: Any, method: str, distance: float) -> None:
    before = {name: unet.get_submodule(name).weight.clone() for name in LAYERS}
    layers = LAYERS[:2] if method == "oft" else LAYERS  # conv_in has 4 channels, which no rotation moves by 3 or more
    seen = {}
    with perturbed(unet, layers, method, distance, seed=5) as mean:
        assert mean == pytest.approx(distance, rel=1e-6)
        for name in layers:
            seen[name] = unet.get_submodule(name).weight.clone()
    assert all(torch.equal(unet.get_submodule(name).weight, before[name]) for name in LAYERS)
    for name in layers:
        singular = [torch.linalg.svdvals(w.double().flatten(1)) for w in (before[name], seen[name])]
        assert not torch.allclose(seen[name], before[name], atol=1e-3)
        if method != "ether_plus" and seen[name].ndim == 2:  # orthogonal: the singular values stay
            assert torch.allclose(*singular, atol=1e-5)
    with perturbed(unet, layers, method, distance, seed=5):
        assert all(torch.equal(unet.get_submodule(name).weight, seen[name]) for name in layers)
    with perturbed(unet, layers, method, distance, seed=5, k=1):
        assert not any(torch.equal(unet.get_submodule(name).weight, seen[name]) for name in layers)


def test_weights_are_restored_after_an_error(unet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ZeroDivisionError), perturbed(unet, LAYERS, "ether", 2.0):
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match="conv_in: 4 features do not divide into 8"),
        perturbed(unet, LAYERS, "ether", 2 * math.sqrt(8), num_blocks=8),
    ):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_a_plan_has_the_distances_that_each_method_can_have(unet: Any) -> None:
    trials = plan(unet, LAYERS[:2], ["oft", "ether", "ether_plus"], [0.5, 1.0, 7.9, 50.0], draws=2)
    found = {(trial.method, round(trial.distance, 3), trial.k) for trial in trials}
    wanted = {"oft": [0.5, 1.0, 7.9], "ether": [2.0], "ether_plus": [0.5, 1.0, 1.414]}
    assert found == {(method, distance, k) for method, ds in wanted.items() for distance in ds for k in (0, 1)}
    assert {trial.method: trial.num_blocks for trial in trials} == {"oft": 4, "ether": 1, "ether_plus": 1}
    assert oft_bound(16, 4) == 8
    with pytest.raises(UserError, match="can have none of the distances 99"):
        plan(unet, LAYERS[:2], ["oft"], [99.0])
    with pytest.raises(UserError, match="conv_in: 4 features do not divide into 4 blocks at least two wide"):
        plan(unet, LAYERS, ["oft"], [0.5])


def test_a_requested_bound_is_listed_once() -> None:
    kind = PERTURBATIONS["ether_plus"]
    assert possible_distances(kind, [24], 1, [1.0, 2**0.5]) == [1.0, math.sqrt(2)]


def test_a_sweep_samples_while_the_weights_are_perturbed(unet: Any) -> None:
    name = LAYERS[1]
    own, moved = unet.get_submodule(name).weight.clone(), []

    def images() -> list:
        moved.append(float((unet.get_submodule(name).weight - own).norm()))
        return []

    trials = [Trial("oft", 1, 0.5, 0), Trial("oft", 1, 2.0, 0)]
    assert [trial for trial, _ in sweep(unet, [name], trials, images)] == trials
    assert 0 < moved[0] < moved[1]


def test_pixel_distance_is_from_0_to_1() -> None:
    from PIL import Image

    black, white, grey = (Image.new("RGB", (4, 3), colour) for colour in ("black", "white", (51, 51, 51)))
    assert pixel_distance([black], [white]) == 1
    assert pixel_distance([black, grey], [black, grey]) == 0
    assert pixel_distance([black, black], [grey, black]) == pytest.approx(0.2 / math.sqrt(2))


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_the_authors_form_repeats_one_block_for_a_share_of_the_output_rows(method: str, blocks: int) -> None:
    rng = generator(0, "test/authors")
    weight = torch.randn(64, 48, generator=rng, dtype=torch.float64)
    distance = 2 * math.sqrt(blocks) if method == "ether" else 0.9 * math.sqrt(2 * blocks)
    change = PERTURBATIONS[method].sample(48, blocks, distance, rng)
    change = T.Change(change.left, change.right)
    one_by_one = [left.mT @ right + torch.eye(48 // blocks) for left, right in zip(*change, strict=True)]
    rows = [
        share @ torch.block_diag(*[block] * blocks)
        for share, block in zip(weight.chunk(blocks), one_by_one, strict=True)
    ]
    found = authors_weight(weight, change)
    torch.testing.assert_close(found, torch.cat(rows))
    paper = T.transform_weight(weight, change)
    x = torch.randn(48, 400, generator=rng, dtype=torch.float64)
    difference = float(((found - paper) @ x).norm() / (paper @ x).norm())
    assert difference < 1e-12 if blocks == 1 else 0.2 < difference < 1.3
    with pytest.raises(UserError, match="63 output features do not divide into 2 shares"):
        authors_weight(weight[:63], T.Change(change.left.new_ones(2, 1, 24), change.right.new_ones(2, 1, 24)))


def test_the_authors_form_has_the_directions_of_the_papers() -> None:
    layer = torch.nn.Module()
    layer.linear = torch.nn.Linear(24, 24)
    found = {}
    for method, blocks in (("ether", 1), ("ether_authors", 1), ("ether", 4), ("ether_authors", 4)):
        with perturbed(layer, ["linear"], method, 2 * math.sqrt(blocks), num_blocks=blocks):
            found[method, blocks] = layer.linear.weight.clone()
    torch.testing.assert_close(found["ether", 1], found["ether_authors", 1])
    assert not torch.allclose(found["ether", 4], found["ether_authors", 4], atol=0.01)

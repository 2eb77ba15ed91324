"""Hyperspherical energy equals a dense sum over all pairs, and is invariant to what keeps angles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import inject
from ether_diffusion.analysis.changes import layer_changes
from ether_diffusion.analysis.energy import BaseEnergies, hyperspherical_energy, model_energy, pairs
from ether_diffusion.tuners import NaiveConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def dense(weight: Tensor) -> float:
    """The definition, with all pairs at once."""
    x = weight.double().flatten(1)
    x = x / x.norm(dim=1, keepdim=True)
    return float((1 / torch.pdist(torch.cat((x, -x)))).sum())


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (30, 7), (7, 30), (6, 4, 3, 3)])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_it_is_the_sum_over_all_pairs_for_any_chunk_size(shape: tuple[int, ...], chunk: int) -> None:
    weight = torch.randn(shape)
    assert hyperspherical_energy(weight, chunk) == pytest.approx(dense(weight), rel=1e-12)


def test_pairs_are_those_of_the_rows_and_their_negatives() -> None:
    assert [pairs(n) for n in (1, 2, 30)] == [math.comb(2 * n, 2) for n in (1, 2, 30)]


def test_orthogonal_rows_are_at_the_distances_of_a_cross_polytope() -> None:
    """Each of the 2n points has its negative at distance 2 and all others at sqrt 2."""
    n = 9
    assert hyperspherical_energy(rotation(n)) == pytest.approx(n / 2 + 2 * n * (n - 1) / math.sqrt(2), rel=1e-12)


def test_a_row_of_zeros_counts_as_orthogonal_to_all() -> None:
    weight = torch.eye(4, 6)
    with_zeros = torch.cat((weight, torch.zeros(1, 6)))
    beside = 2 * 4 * 2 / math.sqrt(2) + 1 / math.sqrt(2)  # its two points with the eight others, and with each other
    assert hyperspherical_energy(with_zeros) == pytest.approx(hyperspherical_energy(weight) + beside, rel=1e-12)


def test_rows_of_one_direction_have_infinite_energy() -> None:
    assert hyperspherical_energy(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) == math.inf


@pytest.mark.parametrize("shape", [(40, 12), (8, 6, 3, 3)])
def test_transforms_that_keep_angles_between_rows_keep_the_energy(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    energy = hyperspherical_energy(weight)
    turned = torch.einsum("oi...,ij->oj...", weight, rotation(shape[1]))
    reordered = weight[torch.randperm(shape[0])]
    rescaled = weight * torch.randn(shape[0], *(1 for _ in shape[1:])).exp()
    negated = weight * torch.randn(shape[0], *(1 for _ in shape[1:])).sign()
    for other in (turned, reordered, rescaled, negated):
        assert hyperspherical_energy(other) == pytest.approx(energy, rel=1e-13)
    assert hyperspherical_energy(weight + 0.1 * torch.randn_like(weight)) != pytest.approx(energy, rel=1e-5)


def test_memory_does_not_hold_all_pairs() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    weight = torch.randn(600, 8)
    with Largest() as largest:
        hyperspherical_energy(weight, chunk=16)
    assert largest.numel == 16 * 600


def test_a_models_energy_is_the_sum_over_layers_of_means_over_pairs() -> None:
    conv, linear = nn.Conv2d(3, 5, 3), nn.Linear(6, 4)
    means = [dense(layer.weight.detach()) / math.comb(2 * n, 2) for layer, n in ((conv, 5), (linear, 4))]
    assert model_energy(nn.Sequential(conv, nn.GroupNorm(1, 5), linear)) == pytest.approx(sum(means), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "keeps"),
    [
        (EtherConfig(variant="ether", target_modules=ATTENTION), True),
        (EtherConfig(variant="ether", num_blocks=4, target_modules=ATTENTION), True),
        (OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=ATTENTION), True),
        (HRAConfig(r=3, target_modules=ATTENTION), True),
        (BOFTConfig(boft_block_num=4, boft_block_size=0, target_modules=ATTENTION), True),
        (EtherConfig(variant="ether", sides="both", target_modules=ATTENTION), False),
        (EtherConfig(variant="ether_plus", target_modules=ATTENTION), False),
        (NaiveConfig(num_blocks=4, target_modules=ATTENTION), False),
        (LoraConfig(r=2, target_modules=ATTENTION), False),
    ],
    ids=["ether", "blocks", "oft", "hra", "boft", "ether on both sides", "ether_plus", "naive", "lora"],
)
def test_reflections_and_rotations_of_the_input_keep_a_bases_energy(unet: Any, config: Any, keeps: bool) -> None:
    inject(unet, config, "default")
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    rows = list(BaseEnergies().changes(layer_changes(unet)))
    assert len(rows) == 32
    for row in rows:
        if keeps:
            assert abs(row.mean_change) < 1e-14
        else:
            assert abs(row.mean_change) > 1e-7


def test_a_bases_energies_are_computed_once(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(weight: Tensor, chunk: int) -> float:
        calls.append(weight)
        return hyperspherical_energy(weight, chunk)

    monkeypatch.setattr("ether_diffusion.analysis.energy.hyperspherical_energy", counted)
    inject(unet, EtherConfig(target_modules=["to_q"]), "default")
    energies = BaseEnergies()
    first, second = (list(energies.changes(layer_changes(unet))) for _ in range(2))
    assert first == second
    assert len(calls) == 3 * len(first)

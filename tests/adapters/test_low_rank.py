"""Changes of weights as LoRA factors: equal to dense formulas and to merged weights, of the stated ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.low_rank import LowRank, adapted_layers, low_rank_changes
from ether_diffusion.errors import UserError
from support import dense
from support.adapted_unets import ADAPTERS, move, saved_as, settings_of
from support.ether_layers import VARIANTS, wrap
from support.unets import one_block_unet

BASES = {
    "linear": lambda: nn.Linear(24, 36),
    "1x1": lambda: nn.Conv2d(24, 36, 1),
    "3x3": lambda: nn.Conv2d(24, 36, 3, padding=1),
}
LOW_RANK = ("ether", "ether_plus", "lora", "hra", "vera", "delora")


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
@pytest.mark.parametrize("kind", BASES)
def test_the_factors_are_the_change_of_the_weight(
    kind: str, variant: str, sides: str, blocks: int, seeded: None
) -> None:
    base = BASES[kind]().double()
    layer = wrap(base, variant=variant, sides=sides, num_blocks=blocks)
    layer.set_scale("default", 0.7)
    B, A = layer.low_rank("default")
    h_out = dense.matrix_of(layer.ether_out["default"]) if sides == "both" else None
    wanted = dense.weight(base.weight, dense.matrix_of(layer.ether_in["default"]), h_out, 0.7) - base.weight
    torch.testing.assert_close(torch.tensordot(B, A, dims=1), wanted, rtol=0, atol=1e-12)
    vectors, positions = {"ether": 1, "ether_plus": 2}[variant], base.weight[0, 0].numel()
    assert B.shape == (36, blocks * vectors * (positions + (sides == "both")))
    assert A.shape == (B.shape[1], *base.weight.shape[1:])


@pytest.mark.parametrize("method", LOW_RANK)
def test_every_method_of_low_rank_gives_the_change_that_merging_makes(method: str) -> None:
    unet, settings = one_block_unet(), settings_of(method)
    attach(unet, settings)
    move(unet)
    changes = low_rank_changes(unet, saved_as(settings))
    layers = adapted_layers(unet)
    assert changes.keys() == layers.keys()
    assert len(changes) == 8
    for path, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        change = layer.get_base_layer().weight.detach() - weight
        assert change.norm() > 0.01 * weight.norm()
        torch.testing.assert_close(changes[path].dense(), change, rtol=0, atol=2e-6)


def test_a_convolution_of_hra_is_exported_too() -> None:
    unet, settings = one_block_unet(), settings_of("hra", target=["conv1", "conv2"], rank=2)
    attach(unet, settings)
    move(unet)
    changes = low_rank_changes(unet, saved_as(settings))
    for path, layer in adapted_layers(unet).items():
        weight = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        assert changes[path].rank == 2
        change = layer.get_base_layer().weight.detach() - weight
        torch.testing.assert_close(changes[path].dense(), change, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", sorted({*ADAPTERS} - {*LOW_RANK}))
def test_a_method_of_full_rank_is_refused_with_the_rank_that_it_has(method: str) -> None:
    unet, settings = one_block_unet(), settings_of(method)
    attach(unet, settings)
    with pytest.raises(UserError, match=r"full rank, here up to 16.*--format merged"):
        low_rank_changes(unet, saved_as(settings))


def test_no_more_ranks_than_the_smaller_side() -> None:
    for out, into in ((6, 10), (10, 6)):
        change = LowRank(torch.randn(out, 30), torch.randn(30, into))
        full = change.at_most_full()
        assert full.rank == 6
        torch.testing.assert_close(full.dense(), change.dense())


def test_balancing_keeps_the_change_and_levels_the_factors() -> None:
    change = LowRank(torch.randn(8, 3) * 1e-6, torch.randn(3, 5, 3, 3) * 1e6)
    change.up[:, 1] = 0
    balanced = change.balanced()
    torch.testing.assert_close(balanced.dense(), change.dense())
    torch.testing.assert_close(balanced.up.norm(dim=0), balanced.down.flatten(1).norm(dim=1))
    assert torch.isfinite(balanced.up).all()
    assert torch.isfinite(balanced.down).all()


def test_truncation_is_the_best_approximation_of_its_rank() -> None:
    change = LowRank(torch.randn(12, 6).double(), torch.randn(6, 5, 3, 3).double())
    values = torch.linalg.svdvals(change.dense().flatten(1))
    for rank in (1, 3, 6):
        near = change.truncated(rank)
        assert near.rank == rank
        error = (near.dense() - change.dense()).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-9, atol=1e-12)  # Eckart and Young

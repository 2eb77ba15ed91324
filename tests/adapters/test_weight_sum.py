"""Sums of weight changes: W + s1 (W1 - W) + s2 (W2 - W), exact for every method, the same bits in any order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.foreign_lora import LoraFile
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.low_rank import LowRank
from ether_diffusion.adapters.saved_adapter import SavedAdapter, previous_adapter, read_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.adapters.weight_sum import add_up, concatenated, dense, write_into
from ether_diffusion.errors import UserError
from support.adapted_unets import ADAPTERS, move, settings_of
from support.unets import one_block_unet, small_unet

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LOW_RANK = ("ether", "ether_plus", "lora", "hra", "vera", "delora")


def saved(folder: Path, method: str, size: float = 0.1, **settings: Any) -> SavedAdapter:
    """An adapter that is away from where it starts."""
    unet = one_block_unet()
    attach(unet, settings_of(method, **settings))
    move(unet, size)
    return read_adapter(save_adapter(unet, folder, base_model="base"))


def lora_file() -> LoraFile:
    change = LowRank(torch.randn(16, 2) / 10, torch.randn(2, 24))
    return LoraFile(Path("x.safetensors"), {f"lora_unet_{TO_K.replace('.', '_')}": change}, "digest")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, SavedAdapter]:
    every = {name: saved(tmp_path / name, name) for name in ADAPTERS}
    after = {"after": tmp_path / "oft"}
    second = one_block_unet()
    load_adapter(second, every["oft"])
    merge(second)
    attach(second, settings_of("magnitude", **after, target="attention"))
    move(second, 0.05)
    return {**every, "two phases": read_adapter(save_adapter(second, tmp_path / "second", base_model="base"))}


def test_the_sum_is_the_base_plus_every_change_times_its_strength(
    adapters: dict[str, SavedAdapter], seeded: None
) -> None:
    """Each change as merging the adapter alone makes it; full ranks and adapters of two phases, too."""
    base = state(one_block_unet())
    strengths = dict(zip(adapters, itertools.cycle((0.8, -0.5, 0.3, 1.0)), strict=False))
    wanted = {key: value.double() for key, value in base.items()}
    for name, adapter in adapters.items():
        unet = one_block_unet()
        load_adapter(unet, adapter)
        merge(unet)
        for key, value in unet.state_dict().items():
            wanted[key] += strengths[name] * (value.double() - base[key].double())
    lora = lora_file()
    wanted[f"{TO_K}.weight"] += 0.6 * next(iter(lora.layers.values())).dense().double()
    sources = [*((adapters[name], strengths[name]) for name in adapters), (lora, 0.6)]
    unet, found = one_block_unet(), {}
    total = add_up({"unet": unet}, sources, low_rank=False)
    assert all(torch.equal(value, base[key]) for key, value in unet.state_dict().items()), "the base is left as it was"
    assert previous_adapter(unet) is None
    assert not hasattr(unet, "peft_config")
    write_into({"unet": unet}, total)
    for key, value in unet.state_dict().items():
        found[key] = (value.double() - wanted[key]).abs().max()
        assert found[key] <= 1e-6 * max(1, len(sources) / 4), key
    assert any(not torch.equal(value, base[key]) for key, value in unet.state_dict().items())


def test_no_order_changes_a_bit(adapters: dict[str, SavedAdapter], seeded: None) -> None:
    sources = [(adapters["ether_plus"], 0.8), (adapters["naive"], 0.5), (adapters["lora"], -0.3), (lora_file(), 0.6)]
    results = []
    for order in itertools.permutations(sources):
        unet = one_block_unet()
        write_into({"unet": unet}, add_up({"unet": unet}, order, low_rank=False))
        results.append(state(unet))
    assert all(torch.equal(one[key], results[0][key]) for one in results for key in one)


def test_factors_of_the_sum_are_the_sum(adapters: dict[str, SavedAdapter], seeded: None) -> None:
    """Ranks add up: 4 of ETHER+, 4 of LoRA, 2 of the file where it has the layer, at most the smaller side."""
    sources = [(adapters["ether_plus"], 0.8), (adapters["lora"], -0.3), (lora_file(), 0.6)]
    total = add_up({"unet": one_block_unet()}, sources, low_rank=True)["unet"]
    assert {len(changes) for changes in total.values()} == {2, 3}
    for layer, changes in total.items():
        factors = concatenated(changes)
        assert factors.rank == (10 if layer == TO_K else 8)
        torch.testing.assert_close(factors.dense(), torch.stack(dense(changes)).sum(0), rtol=0, atol=1e-6)
    many = add_up({"unet": one_block_unet()}, [(adapters[name], 0.5) for name in LOW_RANK], low_rank=True)["unet"]
    assert {concatenated(changes).rank for changes in many.values()} == {16}


@pytest.mark.parametrize("name", ["oft", "naive", "two phases"])
def test_factors_of_full_rank_are_refused_with_the_rank(name: str, adapters: dict[str, SavedAdapter]) -> None:
    unet = one_block_unet()
    with pytest.raises(UserError, match=r"full rank, here up to 16.*--format merged"):
        add_up({"unet": unet}, [(adapters["lora"], 1.0), (adapters[name], 1.0)], low_rank=True)
    assert not hasattr(unet, "peft_config")


def test_a_sum_that_is_not_finite_is_refused(adapters: dict[str, SavedAdapter]) -> None:
    unet = one_block_unet()
    huge = {"unet": {TO_K: [LowRank(torch.full((16, 1), 1e30), torch.full((1, 24), 1e30))]}}
    with pytest.raises(UserError, match=f"{TO_K}: the sum of the changes is not finite"):
        write_into({"unet": unet}, huge)


def test_an_adapter_of_another_base_is_refused_and_nothing_is_left(
    adapters: dict[str, SavedAdapter], tmp_path: Path
) -> None:
    unet = small_unet()
    before = state(unet)
    with pytest.raises(UserError, match="does not fit"):
        add_up({"unet": unet}, [(adapters["ether_plus"], 1.0)], low_rank=False)
    with pytest.raises(UserError, match="does not fit this base"):
        add_up({"unet": unet}, [(lora_file(), 1.0)], low_rank=False)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())

"""FLOPs of passes: closed forms, the paper's numbers, and equal counts on meta and real tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ether_diffusion.analysis import cost
from ether_diffusion.analysis.cost_report import subjects
from ether_diffusion.analysis.published import COSTS
from ether_diffusion.ether import EtherConfig

WIDTH, TOKENS, LAYERS = 32, 6, 2
FUSED = ("q_proj", "k_proj", "v_proj")


def small() -> nn.Module:
    plain: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False}
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        **plain,
    )
    return LlamaForCausalLM(config)


def inputs() -> dict[str, torch.Tensor]:
    return {"inputs_embeds": torch.ones(1, TOKENS, WIDTH), "attention_mask": torch.zeros(1, 1, TOKENS, TOKENS)}


SMALL = cost.Subject("small", small, inputs, (*FUSED, "o_proj"), FUSED)


def adapter(variant: cost.Variant, num_blocks: int) -> EtherConfig:
    return EtherConfig(variant=variant, num_blocks=num_blocks, target_modules=list(SMALL.layers))


@pytest.fixture(scope="module", autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("variant", "outer"), [("ether", False), ("ether_plus", True)])
def test_the_part_that_depends_on_blocks_is_the_closed_form_of_the_products(variant: cost.Variant, outer: bool) -> None:
    with torch.device("meta"):
        shapes = list(cost.group_shapes(small(), SMALL).values())
    assert shapes == [(3 * WIDTH, WIDTH), (WIDTH, WIDTH)] * LAYERS
    one, four = (cost.count_dense(SMALL, variant, n) for n in (1, 4))
    between = cost.dense_products(shapes, 1, outer=outer) - cost.dense_products(shapes, 4, outer=outer)
    again = cost.dense_products(shapes, 1, False, outer) - cost.dense_products(shapes, 4, False, outer)
    assert one.forward - four.forward == between
    assert one.backward - four.backward == between + again


def test_a_dense_forward_costs_the_frozen_one_and_the_products() -> None:
    with torch.device("meta"):
        shapes = list(cost.group_shapes(small(), SMALL).values())
    dense, base = cost.count_dense(SMALL, "ether", 2), cost.count_passes(SMALL)
    assert dense.forward - base.forward == cost.dense_products(shapes, 2)


def test_the_papers_numbers_of_llama() -> None:
    """17.59 TFLOPs with the input's transform; the paper's ETHER+ has the output's only (PROTOCOL, section 5)."""
    llama = subjects()["llama"]
    with torch.device("meta"):
        model = llama.build()
    shapes = list(cost.group_shapes(model, llama).values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    assert cost.dense_products(shapes, 1) == 32 * 2 * 4096**2 * (12288 + 4096) == 17_592_186_044_416
    output_side = cost.dense_products(shapes, 1, inner=False, outer=True)
    for method, y in (("ether", cost.dense_products(shapes, 1)), ("ether_plus", output_side)):
        printed = COSTS["llama"][method]
        assert (printed[1] - printed[4]) / 0.75 == pytest.approx(y / 1e12, abs=0.01)


def test_parameters_are_those_of_the_public_models() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in subjects()[key].build().parameters()) for key in ("phi", "unet")]
    assert counts == [1_418_270_720, 859_520_964]


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_counts_on_meta_tensors_are_those_of_a_real_pass(variant: cost.Variant) -> None:
    model = small().requires_grad_(False)
    inject_adapter_in_model(adapter(variant, 2), model)
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs()).logits.square().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = cost.count_passes(SMALL, adapter(variant, 2))
    assert (found.forward, found.backward) == (forward.get_total_flops(), backward.get_total_flops())


@pytest.mark.parametrize(("variant", "sides"), [("ether", "in"), ("ether_plus", "in"), ("ether_plus", "both")])
def test_both_ways_apply_the_same_transform(variant: cost.Variant, sides: Literal["in", "both"]) -> None:
    layer = nn.Linear(8, 12, bias=False)
    model = nn.ModuleDict({"layer": layer})
    config = EtherConfig(variant=variant, sides=sides, num_blocks=2, init_weights=False, target_modules=["layer"])
    inject_adapter_in_model(config, model)
    adapted = model["layer"]
    planes = [adapted.ether_in["default"], *adapted.ether_out.values()]  # pyright: ignore
    normals = [[one.u] if one.v is None else [one.u, one.v] for one in planes]
    x = torch.randn(5, 8)
    torch.testing.assert_close(x @ cost.dense_weight(layer.weight, normals).T, adapted(x))


def test_on_activations_a_transform_costs_two_thin_products_per_token_for_any_number_of_blocks() -> None:
    base, one, eight = cost.count_passes(SMALL), *(cost.count_passes(SMALL, adapter("ether_plus", n)) for n in (1, 8))
    assert one == eight
    sides, vectors, products = 2, 2, 2
    assert one.forward - base.forward == LAYERS * 4 * sides * TOKENS * products * 2 * vectors * WIDTH

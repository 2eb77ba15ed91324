"""ETHER in diffusers' attention processors equals the PEFT adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.attention_processor import (
    EtherAttnProcessor,
    ether_parameters,
    load_ether_processors,
    processors_to_peft,
    remove_ether_processors,
    set_ether_processors,
)
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS, MethodSettings
from ether_diffusion.adapters.saving import adapter_state, save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base


class Loudness:
    """A third party's processor: a parameter of its own, and of diffusers' names only `attn`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loudness: float = 1.0,
    ) -> Tensor:
        return loudness * AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return load_base("tiny").unet


@pytest.fixture
def unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(base)


def settings(method: str = "ether_plus", **values: Any) -> MethodSettings:
    return METHODS[method](**values)


def config(method: str = "ether_plus", **values: Any) -> EtherConfig:
    made = settings(method, **values).peft_config()
    assert isinstance(made, EtherConfig)
    return made


def vectors(unet: UNet2DConditionModel) -> list[tuple[str, torch.nn.Parameter]]:
    """The trainable ones, in the one order that both routes have: that of their layers' names."""
    found = [(n.replace(".processor.layers.out.", ".to_out.0."), p) for n, p in unet.named_parameters()]
    for key in "qkv":
        found = [(n.replace(f".processor.layers.{key}.", f".to_{key}."), p) for n, p in found]
    return sorted((n, p) for n, p in found if p.requires_grad)


def move_off_the_start(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in vectors(unet):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def sample(unet: UNet2DConditionModel, **kwargs: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 8, 8, 8, generator=g), torch.randn(2, 7, 128, generator=g)
    return unet(x.to(unet.dtype), torch.tensor([10, 500]), c.to(unet.dtype), **kwargs).sample


@pytest.fixture
def pair(base: UNet2DConditionModel) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """A UNet with an adapter by PEFT, and one with the same vectors in processors."""
    return pair_of(base)


def pair_of(base: UNet2DConditionModel, **values: Any) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    by_peft, by_processor = copy.deepcopy(base), copy.deepcopy(base)
    attach(by_peft, settings(**values))
    set_ether_processors(by_processor, config(**values))
    return move_off_the_start(by_peft), move_off_the_start(by_processor)


@pytest.mark.parametrize("delegate", [AttnProcessor2_0(), AttnProcessor(), SlicedAttnProcessor(2), Loudness()])
@pytest.mark.parametrize("values", [{"method": "ether"}, {"method": "ether_plus", "num_blocks": 2}])
def test_outputs_and_gradients_equal_pefts_bit_for_bit_for_any_delegate(
    unet: UNet2DConditionModel, values: dict[str, Any], delegate: Any
) -> None:
    unet.set_attn_processor(delegate)
    plain = sample(unet)
    results = []
    for adapted in pair_of(unet, **values):
        output = sample(adapted)
        output.square().sum().backward()
        results.append((output, [(name, p.detach(), p.grad) for name, p in vectors(adapted)]))
    (expected, theirs), (found, ours) = results
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert len(ours) == len(theirs) > 0
    for (name, vector, grad), (peft_name, peft_vector, peft_grad) in zip(ours, theirs, strict=True):
        assert name == peft_name
        assert torch.equal(vector, peft_vector)
        assert grad is not None
        assert peft_grad is not None
        assert grad.abs().sum() > 0
        assert torch.equal(grad, peft_grad)


def test_half_precision_equals_pefts_bit_for_bit(unet: UNet2DConditionModel) -> None:
    by_peft, by_processor = pair_of(unet.to(dtype=torch.bfloat16))  # pyright: ignore
    assert torch.equal(sample(by_processor), sample(by_peft))
    assert {p.dtype for p in ether_parameters(by_processor).values()} == {torch.float32}


def test_same_seed_same_start(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> None:
    by_peft = copy.deepcopy(base)
    attach(by_peft, settings("ether"), seed=3)
    found, expected = set_ether_processors(unet, config("ether"), seed=3), adapter_state(by_peft)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_patterns_and_exclusions_select_as_in_peft(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> None:
    by_peft = copy.deepcopy(base)
    target = r".*(up|mid)_block.*attn2\.(to_k|to_out\.0)"
    special = {"target": target, "sides_pattern": {"to_k": "in"}, "blocks_pattern": {"to_out.0": 4}}
    attach(by_peft, settings(**special))
    found = set_ether_processors(unet, config(**special))
    assert {k: p.shape for k, p in found.items()} == {k: t.shape for k, t in adapter_state(by_peft).items()}
    assert 0 < sum(isinstance(p, EtherAttnProcessor) for p in unet.attn_processors.values()) < len(unet.attn_processors)


def test_the_scale_of_a_call_is_that_of_peft(pair: tuple[UNet2DConditionModel, UNet2DConditionModel]) -> None:
    half = [sample(unet, cross_attention_kwargs={"scale": 0.4}) for unet in pair]
    assert torch.equal(*half)
    assert not torch.equal(half[1], sample(pair[1]))


def test_the_delegate_receives_its_own_arguments(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor(Loudness())  # pyright: ignore
    expected = sample(unet, cross_attention_kwargs={"loudness": 3.0})
    assert not torch.allclose(expected, sample(unet))
    set_ether_processors(unet, config())
    assert torch.equal(sample(unet, cross_attention_kwargs={"loudness": 3.0}), expected)


def test_a_copy_is_complete_and_independent(pair: tuple[UNet2DConditionModel, UNet2DConditionModel]) -> None:
    twin = copy.deepcopy(pair[1])
    assert torch.equal(sample(twin), sample(pair[1]))
    before = sample(pair[1])
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(sample(pair[1]), before)


def test_the_state_has_the_frozen_weights_once_and_the_vectors(unet: UNet2DConditionModel) -> None:
    before = set(unet.state_dict())
    found = set_ether_processors(unet, config())
    assert before < set(unet.state_dict())
    assert len(unet.state_dict()) == len(before) + len(found)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in found.values()}


def test_removing_restores_the_previous_processors(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})
    before, expected, keys = unet.attn_processors, sample(unet), set(unet.state_dict())
    set_ether_processors(unet, config("ether"))
    assert not torch.equal(sample(unet), expected)
    remove_ether_processors(unet)
    assert all(unet.attn_processors[name] is before[name] for name in before)
    assert torch.equal(sample(unet), expected)
    assert set(unet.state_dict()) == keys


def test_a_saved_peft_adapter_loads(unet: UNet2DConditionModel, pair: tuple[Any, Any], tmp_path: Path) -> None:
    folder = save_adapter(pair[0], tmp_path / "adapter", base_model="tiny")
    load_ether_processors(unet, folder)
    assert torch.equal(sample(unet), sample(pair[0]))


def test_converted_to_peft_it_saves_and_merges(
    unet: UNet2DConditionModel, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    expected = sample(pair[1])
    processors_to_peft(pair[1])
    assert torch.equal(sample(pair[1]), expected)
    load_adapter(unet, save_adapter(pair[1], tmp_path / "adapter", base_model="tiny"))
    assert torch.equal(sample(unet), expected)
    merge(unet)
    torch.testing.assert_close(sample(unet), expected, rtol=0, atol=1e-5)


def test_one_attention_alone_has_the_reflected_weight(unet: UNet2DConditionModel) -> None:
    attn: Any = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").double()
    x = torch.randn(1, 5, attn.query_dim, generator=torch.Generator().manual_seed(2)).double()
    before = attn(x)
    attn.set_processor(EtherAttnProcessor(attn, EtherConfig(variant="ether", target_modules=["to_v"])))
    found = attn(x)
    u = attn.processor.layers["v"].ether_in["default"].u[0].detach()
    attn.set_processor(AttnProcessor2_0())
    assert torch.equal(attn(x), before)  # gone with its processor
    attn.to_v.weight.data @= torch.eye(len(u)).double() - 2 * torch.outer(u, u) / (u @ u)
    torch.testing.assert_close(found, attn(x))
    assert not torch.allclose(found, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "linear"}, r"do not reach down_blocks.*ff\.net\.\S+ \(of \d+"),
        ({"target": "tu_q"}, "matches no linear"),
        ({"num_blocks": 7}, "do not divide into 7 blocks"),
    ],
)
def test_what_a_processor_cannot_do_is_refused_and_changes_nothing(
    unet: UNet2DConditionModel, values: dict[str, Any], message: str
) -> None:
    unet.requires_grad_(True)
    before = unet.attn_processors
    with pytest.raises(ValueError, match=message):
        set_ether_processors(unet, config(**values))
    assert unet.attn_processors == before
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_a_folder_of_another_method_is_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    attach(unet, settings("lora"))
    folder = save_adapter(unet, tmp_path / "adapter", base_model="tiny")
    with pytest.raises(UserError, match="is a LoRA adapter"):
        load_ether_processors(load_base("tiny").unet, folder)


def test_two_adapters_on_one_projection_are_refused(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> None:
    set_ether_processors(unet, config())
    with pytest.raises(UserError, match="already; take them off first"):
        set_ether_processors(unet, config())
    attach(unet, settings("lora"))
    with pytest.raises(ValueError, match="to_q was replaced after"):
        sample(unet)
    adapted = copy.deepcopy(base)
    attach(adapted, settings())
    with pytest.raises(UserError, match="carries an adapter already"):
        set_ether_processors(adapted, config())


@pytest.mark.slow
def test_it_compiles_whole(pair: tuple[UNet2DConditionModel, UNet2DConditionModel]) -> None:
    torch.compiler.reset()
    expected = sample(pair[1])
    compiled: Any = torch.compile(pair[1], fullgraph=True, backend="eager")
    torch.testing.assert_close(sample(compiled), expected, rtol=0, atol=1e-5)  # compiled, the sums have another order

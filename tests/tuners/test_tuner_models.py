"""Naive and magnitude adapters in whole models, through PEFT's and diffusers' own functions."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from ether_diffusion.adapters.attach import attach, count_parameters
from ether_diffusion.adapters.own_methods import MagnitudeSettings, NaiveSettings
from ether_diffusion.ether.weight_layer import WeightLayer
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.tuners import NaiveConfig
from support.layers import LAYERS, Mlp, random_input
from support.tuner_layers import METHODS, config, dense_weight, trained
from support.unets import small_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
each_method = pytest.mark.parametrize("method", METHODS)


def adapted(method: str, model: nn.Module, **settings: Any) -> Any:
    return get_peft_model(model, config(method, **{"target_modules": ["lin0", "lin1"], **settings}))


@pytest.fixture(scope="module")
def base() -> Any:
    return small_unet()


def run(unet: Any, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([7, 300]), text, **kwargs).sample


def with_dense_weights(unet: Any, **scales: float) -> Any:
    """A copy of the UNet with plain layers, whose weights hold these adapters at these scales."""
    plain = copy.deepcopy(unet)
    layers: list[tuple[str, Any]] = [(n, m) for n, m in plain.named_modules() if isinstance(m, WeightLayer)]
    for name, layer in layers:
        weight = layer.base_layer.weight
        for adapter, scale in scales.items():
            weight = dense_weight(layer, weight, adapter, scale)
        layer.base_layer.weight.data = weight.detach().float()
        plain.set_submodule(name, layer.base_layer)
    return plain


# PROTOCOL's counts, measured on the published architecture. The paper reports half of Naive's, as it does of OFT's.
@pytest.mark.parametrize(
    ("settings", "layers", "parameters"),
    [
        (NaiveSettings(), 128, 23_304_192),
        (NaiveSettings(target="attention+geglu"), 144, 26_401_792),
        (MagnitudeSettings(), 128, 99_840),
        (MagnitudeSettings(target="attention+geglu"), 144, 199_680),
    ],
)
def test_trainable_parameters_on_sd15(settings: Any, layers: int, parameters: int) -> None:
    with torch.device("meta"):
        unet = build_unet()
    assert len(attach(unet, settings)) == layers
    assert count_parameters(unet) == parameters


# OFT's D^2 / 2, for which the paper states 11.6M and 13.2M.
def test_half_of_naives_parameters_is_what_the_paper_states() -> None:
    assert (23_304_192 // 2, 26_401_792 // 2) == (11_652_096, 13_200_896)


@pytest.mark.parametrize("kind", ["linear", "conv 1x1"])
def test_naive_at_orthogonal_blocks_is_peft_oft_with_the_same_matrices(kind):
    base = nn.Sequential(LAYERS[kind]())
    settings = {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "init_weights": False}
    theirs: Any = get_peft_model(copy.deepcopy(base), OFTConfig(target_modules=["0"], **settings))
    ours: Any = get_peft_model(copy.deepcopy(base), NaiveConfig(num_blocks=4, target_modules=["0"]))
    theirs_layer, ours_layer = theirs.base_model.model[0], ours.base_model.model[0]
    rotation = theirs_layer.oft_R["default"].get_weight().detach()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12))
    with torch.no_grad():
        for i, block in enumerate(trained(ours_layer)):
            block.copy_(rotation[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] - torch.eye(3))
    x = random_input(base[0], torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    ours_layer.merge()
    theirs_layer.merge(safe_merge=True)
    torch.testing.assert_close(ours_layer.get_base_layer().weight, theirs_layer.get_base_layer().weight)


@each_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_with_plain_peft(tmp_path, method, low_cpu_mem_usage):
    base = Mlp()
    model = adapted(method, copy.deepcopy(base)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))
    (attribute,) = model.base_model.model.lin0.adapter_layer_names
    keys = {f"base_model.model.{lin}.{attribute}.change" for lin in ("lin0", "lin1")}
    assert set(get_peft_model_state_dict(model)) == keys


@each_method
def test_merging_switching_disabling_and_unloading(method):
    base, x = Mlp(), torch.randn(3, 16)
    expected = base(x)
    model = adapted(method, base)
    model.add_adapter("second", config(method, target_modules=["lin1"]))
    first = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), first, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.set_adapter("second")
    assert not torch.allclose(model(x), first, atol=1e-3)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(x), first, rtol=0, atol=1e-5)
    assert not any(isinstance(module, WeightLayer) for module in merged.modules())


@each_method
def test_diffusers_sets_weights_and_order_and_scales_one_call(base, method):
    unet = copy.deepcopy(base)
    unet.add_adapter(config(method, target_modules=ATTENTION), "a")
    unet.add_adapter(config(method, target_modules=ATTENTION), "b")
    unet.set_adapters(["b", "a"], [0.4, 0.7])
    torch.testing.assert_close(run(unet), run(with_dense_weights(unet, b=0.4, a=0.7)), rtol=0, atol=1e-5)
    unet.set_adapters("a", 1.0)
    full = run(unet)
    halved = run(unet, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(halved, run(with_dense_weights(unet, a=0.5)), rtol=0, atol=1e-5)
    assert torch.equal(run(unet), full)
    unet.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(run(unet), halved, rtol=0, atol=1e-5)
    unet.unfuse_lora()
    unet.disable_adapters()
    assert torch.equal(run(unet), run(base))


@each_method
def test_fused_projections_do_not_drop_an_adapter(base, method):
    unet = copy.deepcopy(base)
    unet.add_adapter(config(method, target_modules=ATTENTION))
    with pytest.raises(ValueError, match=r"silently drop the (Naive|Magnitude) adapter on to_q"):
        unet.fuse_qkv_projections()


@each_method
@pytest.mark.parametrize("way", ["memory", "disk"])
def test_an_offloaded_model_gives_the_same_output(tmp_path, method, way):
    model = adapted(method, Mlp()).eval()
    x, cpu = torch.randn(3, 16), torch.device("cpu")
    with torch.no_grad():
        expected = model(x)
        if way == "memory":
            accelerate.cpu_offload(model, execution_device=cpu)
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(x), expected)


@each_method
def test_an_adapter_is_injected_empty_and_filled(method):
    source, settings = Mlp(), config(method, target_modules=["lin0", "lin1"])
    target = copy.deepcopy(source)
    inject_adapter_in_model(settings, source)
    inject_adapter_in_model(copy.deepcopy(settings), target, low_cpu_mem_usage=True)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    x = torch.randn(3, 16)
    assert torch.equal(target(x), source(x))


@each_method
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), r"0: \w+ does not adapt grouped convolutions \(groups = 2\)"),
        (nn.Embedding(8, 8), r"0: \w+ adapts nn.Linear and nn.Conv2d, not Embedding"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_and_the_model_left_untouched(method, layer, message):
    base = nn.Sequential(layer, nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(method, target_modules=["1", "0"]))  # pyright: ignore[reportArgumentType]
    assert [type(m) for m in base] == [type(layer), nn.Linear]


@each_method
def test_a_layer_of_another_method_is_not_wrapped(method):
    base = Mlp()
    inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), base)
    with pytest.raises(ValueError, match=r"lin0 already carries .* of another method .* (Naive|Magnitude) does"):
        inject_adapter_in_model(config(method, target_modules=["lin0"]), base, adapter_name="second")


def test_block_counts_that_do_not_fit_are_one_error_that_names_those_that_do():
    with pytest.raises(ValueError, match=r"num_blocks = 3 does not divide lin0 \(16 features, 3 blocks\)") as error:
        adapted("naive", Mlp(), num_blocks=3)
    assert str(error.value).endswith("into equal blocks. These counts fit all target layers: 1, 2, 4, 8.")
    with pytest.raises(ValueError, match=r"NaiveConfig: blocks_pattern\['lin0'\] is 0; allowed: whole numbers from 1"):
        NaiveConfig(blocks_pattern={"lin0": 0})


def test_patterns_set_blocks_of_single_layers():
    model = adapted("naive", Mlp(), num_blocks=2, blocks_pattern={"lin1": 4}).base_model.model
    assert [tuple(trained(layer).shape) for layer in (model.lin0, model.lin1)] == [(2, 8, 8), (4, 6, 6)]

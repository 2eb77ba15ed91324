"""ETHER in whole models through PEFT: targets, refusals, saving, loading, merging, conversion, offloading."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.ether import EtherLayer
from support.layers import Mlp


def adapted(model: nn.Module, **settings: Any) -> Any:
    config = EtherConfig(**{"target_modules": ["lin0", "lin1"], "init_weights": False, **settings})
    return get_peft_model(model, config)


def layers(model: nn.Module) -> dict[str, Any]:
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, EtherLayer)}


def x16():
    return torch.randn(3, 16)


def test_parameters_do_not_depend_on_the_number_of_blocks():
    counts = {adapted(Mlp(), num_blocks=n).get_nb_trainable_parameters()[0] for n in (1, 2, 4, 8)}
    assert counts == {2 * (16 + 24 + 24 + 16)}


def test_patterns_set_sides_and_blocks_of_single_layers():
    model = adapted(Mlp(), sides_pattern={"lin0": "in"}, blocks_pattern={"lin1": 4}, num_blocks=2)
    lin0, lin1 = layers(model).values()
    assert ("default" in lin0.ether_out, lin0.r["default"]) == (False, 2)
    assert ("default" in lin1.ether_out, lin1.r["default"]) == (True, 4)
    assert lin1.ether_in["default"].u.shape == (4, 6)


def test_patterns_survive_saving(tmp_path):
    model = adapted(Mlp(), sides_pattern={"lin0": "in"}, blocks_pattern={"lin1": 4}).eval()
    x, base = x16(), copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(x), model(x))


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        (["lin0", "lin1"], ["lin1"], ["lin0"]),
        ("all-linear", ["head"], ["lin0", "lin1"]),
        ("all-linear", None, ["lin0", "lin1", "head"]),
        (r"lin\d", None, ["lin0", "lin1"]),
    ],
)
def test_targets_and_exclusions(targets, excluded, expected):
    assert list(layers(adapted(Mlp(), target_modules=targets, exclude_modules=excluded))) == expected


def test_modules_to_save_are_trained_whole_and_restored(tmp_path):
    base = Mlp()
    model = adapted(copy.deepcopy(base), modules_to_save=["head"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = x16()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.base_model.model.head.modules_to_save["default"].weight, base.head.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(x), model(x))


def test_block_counts_that_do_not_fit_are_one_error_that_names_those_that_do():
    base = Mlp()
    with pytest.raises(ValueError, match="num_blocks = 3") as error:
        adapted(base, num_blocks=3)
    message = str(error.value)
    assert "lin0 (16 -> 24 features, 3 blocks)" in message
    assert "lin1 (24 -> 16 features, 3 blocks)" in message
    assert message.endswith("These counts fit all target layers: 1, 2, 4, 8.")
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())


def test_counts_that_fit_consider_only_the_sides_in_use():
    with pytest.raises(
        ValueError, match=r"lin1 \(24 features, 16 blocks\).*fit all target layers: 1, 2, 3, 4, 6, 8, 12"
    ):
        adapted(Mlp(), target_modules=["lin1"], variant="ether", num_blocks=16)


def refused():
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    return {
        "grouped convolution": (grouped, {}, r"0: ETHER does not adapt grouped convolutions \(groups = 2\)"),
        "1d convolution": (nn.Conv1d(8, 8, 3), {}, "adapts nn.Linear and nn.Conv2d, not Conv1d"),
        "embedding": (nn.Embedding(8, 8), {}, "adapts nn.Linear and nn.Conv2d, not Embedding"),
        "block of width one": (nn.Linear(8, 8), {"num_blocks": 8}, "equal blocks at least two wide.*: 1, 2, 4"),
        "one output": (nn.Linear(8, 1), {}, "0: 1 features do not divide into 1 blocks at least two wide"),
    }


@pytest.mark.parametrize("case", refused())
def test_layers_that_cannot_be_adapted_are_refused_and_the_model_left_untouched(case):
    layer, settings, message = refused()[case]
    base = nn.Sequential(layer, nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, EtherConfig(target_modules=["1", "0"], **settings))
    assert [type(m) for m in base] == [type(layer), nn.Linear]
    assert base[0] is layer


def test_a_layer_of_another_method_is_not_wrapped():
    base = Mlp()
    inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), base)
    with pytest.raises(ValueError, match=r"lin0 already carries an adapter of another method \(peft.tuners.lora"):
        inject_adapter_in_model(EtherConfig(target_modules=["lin1", "lin0"]), base, adapter_name="second")
    assert type(base.lin1) is nn.Linear


def test_an_added_adapter_that_does_not_fit_leaves_the_first_as_it_was():
    model = adapted(Mlp()).eval()
    x = x16()
    expected = model(x)
    with pytest.raises(ValueError, match="num_blocks = 5"):
        model.add_adapter("second", EtherConfig(target_modules=["lin0"], num_blocks=5))
    assert torch.equal(model(x), expected)
    assert list(layers(model)["lin0"].scaling) == ["default"]


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_loads_with_plain_peft(tmp_path, variant, low_cpu_mem_usage):
    base = Mlp()
    model = adapted(copy.deepcopy(base), variant=variant, num_blocks=2).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    x = x16()
    assert torch.equal(loaded(x), model(x))
    assert loaded.get_nb_trainable_parameters()[0] == 0


def test_trained_parameters_are_the_vectors_and_nothing_else():
    model = adapted(Mlp())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"ether_in", "ether_out"}
    assert len(trained) == 8
    assert set(get_peft_model_state_dict(model)) == {name.replace(".default", "") for name in trained}


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_vectors_are_stored_in_the_bases_dtype_only_if_asked(autocast, dtype):
    config = EtherConfig(target_modules=["lin0", "lin1"])
    base = Mlp().to(torch.bfloat16)
    x = x16().to(torch.bfloat16)
    expected = base(x)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if "ether_" in n} == {dtype}
    assert torch.equal(model(x), expected)


def test_merge_and_unload_gives_the_plain_architecture():
    base = Mlp()
    model = adapted(copy.deepcopy(base))
    x = x16()
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert {name: type(m) for name, m in merged.named_modules()} == {name: type(m) for name, m in base.named_modules()}
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)


def test_unload_gives_back_the_base():
    base = Mlp()
    x = x16()
    expected = base(x)
    assert torch.equal(adapted(base).unload()(x), expected)


def test_merge_adapter_and_unmerge_adapter():
    model = adapted(Mlp())
    weight = model.base_model.model.lin0.base_layer.weight.clone()
    x = x16()
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, weight)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_give_the_base(merged):
    base = Mlp()
    x = x16()
    expected = base(x)
    model = adapted(base)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_several_named_adapters_are_switched_and_deleted():
    model = adapted(Mlp())
    model.add_adapter("second", EtherConfig(variant="ether", target_modules=["lin1"]))
    x = x16()
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    assert not torch.allclose(first, second, atol=1e-3)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert not any("second" in name for name, _ in model.named_parameters())


def test_adapter_is_injected_empty_and_filled():
    source = copy.deepcopy(target := Mlp())
    config = EtherConfig(target_modules=["lin0", "lin1"], init_weights=False)
    inject_adapter_in_model(config, source)
    inject_adapter_in_model(config, target, low_cpu_mem_usage=True)
    assert {p.device.type for n, p in target.named_parameters() if "ether_" in n} == {"meta"}
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    x = x16()
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize(("sides", "factor"), [("in", 1), ("both", 2)])
def test_conversion_to_lora_at_the_exact_rank_loses_nothing(variant, sides, factor):
    base = Mlp()
    model = adapted(copy.deepcopy(base), variant=variant, sides=sides).eval()
    rank = factor * (1 if variant == "ether" else 2)
    lora_config, state = convert_to_lora(model, rank=rank)
    lora = get_peft_model(base, lora_config).eval()
    set_peft_model_state_dict(lora, state)
    x = x16()
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_offloaded_base_gives_the_same_output(kind, scale):
    base = (
        Mlp()
        if kind == "linear"
        else nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, dilation=2), nn.SiLU(), nn.Conv2d(6, 4, 1))
    )
    x = x16() if kind == "linear" else torch.randn(2, 8, 7, 7)
    targets = ["lin0", "lin1"] if kind == "linear" else ["0", "2"]
    model = adapted(base, variant="ether_plus", target_modules=targets).eval()
    for layer in layers(model).values():
        layer.set_scale("default", scale)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(model(x), expected)


def test_offloaded_model_merges():
    model = adapted(Mlp(), variant="ether_plus").eval()
    x = x16()
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_model_on_disk_gives_the_same_output(tmp_path):
    model = adapted(Mlp(), variant="ether_plus").eval()
    x = x16()
    with torch.no_grad():
        expected = model(x)
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert torch.equal(model(x), expected)


def test_copy_of_a_model_is_independent():
    model = adapted(Mlp())
    x = x16()
    expected = model(x)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(model(x), expected)

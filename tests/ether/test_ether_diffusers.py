"""ETHER through diffusers' own adapter functions, on a tiny UNet; nothing here goes through PeftModel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.ether import EtherLayer
from support import dense
from support.unets import one_block_unet, small_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = 32


@pytest.fixture(scope="module")
def base():
    return small_unet()


@pytest.fixture
def unet(base):
    return copy.deepcopy(base)


def config(**settings):
    return EtherConfig(**{"target_modules": ATTENTION, "init_weights": False, **settings})


def run(unet, **kwargs):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator).to(unet.dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor([7, 300]), text, **kwargs).sample


def with_dense_weights(unet, **weights):
    """A copy of the UNet whose adapted layers are plain ones, with these adapters at these weights in their weight."""
    plain = copy.deepcopy(unet)
    layers: list[tuple[str, Any]] = [(n, m) for n, m in plain.named_modules() if isinstance(m, EtherLayer)]
    for name, layer in layers:
        weight = layer.base_layer.weight
        for adapter, scale in weights.items():
            h_out = dense.matrix_of(layer.ether_out[adapter]) if adapter in layer.ether_out else None
            weight = dense.weight(weight, dense.matrix_of(layer.ether_in[adapter]), h_out, scale)
        layer.base_layer.weight.data = weight.float()
        plain.set_submodule(name, layer.base_layer)
    return plain


def assert_close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_added_adapter_acts_like_the_dense_weights(unet, variant):
    unet.add_adapter(config(variant=variant, num_blocks=2))
    assert sum(isinstance(m, EtherLayer) for m in unet.modules()) == LAYERS
    assert_close(run(unet), run(with_dense_weights(unet, default=1.0)))


def test_every_linear_and_convolution_can_be_adapted(unet):
    names = [n for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    unet.add_adapter(config(variant="ether_plus", target_modules=names))
    assert sum(isinstance(m, EtherLayer) for m in unet.modules()) == len(names)
    assert_close(run(unet), run(with_dense_weights(unet, default=1.0)))


def test_ether_plus_changes_no_bit_of_the_unet_at_the_start(unet):
    expected = run(unet)
    unet.add_adapter(config(variant="ether_plus", init_weights=True))
    assert torch.equal(run(unet), expected)


def test_set_adapters_takes_weights_and_order(unet):
    unet.add_adapter(config(variant="ether_plus"), "a")
    unet.add_adapter(config(variant="ether", num_blocks=2), "b")
    outputs = []
    for order in (["a", "b"], ["b", "a"]):
        scales = {"a": 0.7, "b": 0.4}
        unet.set_adapters(order, [scales[name] for name in order])
        outputs.append(run(unet))
        assert_close(outputs[-1], run(with_dense_weights(unet, **{name: scales[name] for name in order})))
    assert not torch.allclose(*outputs, atol=1e-4)


def test_set_adapter_disable_and_enable(unet):
    expected = run(unet)
    unet.add_adapter(config(), "a")
    unet.add_adapter(config(), "b")
    unet.set_adapter("a")
    assert unet.active_adapters() == ["a"]
    a = run(unet)
    assert_close(a, run(with_dense_weights(unet, a=1.0)))
    unet.disable_adapters()
    assert torch.equal(run(unet), expected)
    unet.enable_adapters()
    assert torch.equal(run(unet), a)


def test_delete_adapters(unet):
    unet.add_adapter(config(), "a")
    unet.add_adapter(config(), "b")
    unet.set_adapter("a")
    expected = run(unet)
    unet.delete_adapters("b")
    assert not any(".b." in name for name, _ in unet.named_parameters())
    assert torch.equal(run(unet), expected)


def test_scale_for_one_call(unet):
    unet.add_adapter(config())
    full = run(unet)
    assert_close(run(unet, cross_attention_kwargs={"scale": 0.3}), run(with_dense_weights(unet, default=0.3)))
    assert torch.equal(run(unet), full)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("safe", [False, True])
def test_fuse_and_unfuse(unet, scale, safe):
    unet.add_adapter(config())
    weights = {n: p.clone() for n, p in unet.named_parameters()}
    unfused = run(unet)
    expected = run(with_dense_weights(unet, default=scale))
    unet.fuse_lora(lora_scale=scale, safe_fusing=safe)
    assert_close(run(unet), expected)
    unet.unfuse_lora()
    assert all(torch.equal(p, weights[n]) for n, p in unet.named_parameters())
    unet.set_adapters("default", 1.0)
    assert torch.equal(run(unet), unfused)


def add_adapter(unet, folder):
    unet.add_adapter(config())


def peft_model(unet, folder):
    get_peft_model(unet, config())


def saved_and_loaded(unet, folder):
    other = copy.deepcopy(unet)
    attach(other, EtherPlusSettings())
    load_adapter(unet, save_adapter(other, folder / "adapter", base_model="a test"))


def peft_from_pretrained(unet, folder):
    get_peft_model(copy.deepcopy(unet), config()).save_pretrained(folder)
    PeftModel.from_pretrained(unet, str(folder))


def second_adapter_over_a_first(unet, folder):
    unet.add_adapter(config(target_modules=["to_out.0"]), "first")
    unet.add_adapter(config(target_modules=["to_q"]), "second")


@pytest.mark.parametrize(
    "route", [add_adapter, peft_model, saved_and_loaded, peft_from_pretrained, second_adapter_over_a_first]
)
@pytest.mark.parametrize("copied", [False, True])
def test_an_adapter_by_any_route_is_not_dropped_by_fused_projections(unet, tmp_path, route, copied):
    route(unet, tmp_path)
    unet = copy.deepcopy(unet) if copied else unet
    with pytest.raises(
        ValueError, match=r"silently drop .* on to_q.* Merge it first: unet\.fuse_lora\(\), or merge_and"
    ):
        unet.fuse_qkv_projections()


def test_fused_projections_keep_a_merged_adapter(unet):
    unet.add_adapter(config())
    expected = run(unet)
    unet.fuse_lora()
    unet.fuse_qkv_projections()
    assert_close(run(unet), expected)


def test_projections_can_be_fused_where_no_adapter_is_active(unet):
    expected = run(unet)
    unet.add_adapter(config())
    unet.disable_adapters()
    unet.fuse_qkv_projections()
    assert_close(run(unet), expected)


def test_an_adapter_that_fused_projections_would_bypass_is_refused(unet):
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn1\.to_q is not run while .*fused\. Call unet\.unfuse_qkv_projections"):
        unet.add_adapter(config())
    unet.add_adapter(config(target_modules=["attn2.to_q", "to_out.0"]), "of layers that still run")
    unet.unfuse_qkv_projections()
    unet.add_adapter(config())
    run(unet)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_weights_stored_in_fp8_act_like_their_upcast(unet, base, adapter_first):
    reference = copy.deepcopy(base)

    def cast():
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    if not adapter_first:
        cast()
    unet.add_adapter(config(variant="ether_plus"))
    if adapter_first:
        cast()
    parameters = dict(unet.named_parameters())
    assert {p.dtype for n, p in parameters.items() if "ether_" in n} == {torch.float32}
    to_out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert parameters[f"{to_out}.base_layer.bias"].dtype == torch.float8_e4m3fn
    reference.add_adapter(config(variant="ether_plus"))
    for name, p in reference.named_parameters():
        p.data = parameters[name].data.float()
    assert_close(run(unet), run(reference))


def test_empty_injection_is_filled_from_a_saved_adapter(unet, base, tmp_path):
    unet.add_adapter(config(num_blocks=2))
    expected = run(unet)
    state = get_peft_model_state_dict(unet)
    unet.peft_config["default"].save_pretrained(tmp_path)

    loaded = copy.deepcopy(base)
    inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), loaded, low_cpu_mem_usage=True)
    assert not set_peft_model_state_dict(loaded, state, low_cpu_mem_usage=True).unexpected_keys
    loaded._hf_peft_config_loaded = True
    loaded.set_adapter("default")
    assert torch.equal(run(loaded), expected)
    loaded.set_adapters("default", 0.5)
    assert not torch.allclose(run(loaded), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_unet_keeps_single_precision_vectors_and_trains_under_checkpointing(unet, dtype):
    unet.to(dtype)
    unet.requires_grad_(False)
    unet.add_adapter(config(variant="ether_plus", init_weights=True))
    unet.enable_gradient_checkpointing()
    unet.train()
    vectors = [p for p in unet.parameters() if p.requires_grad]
    assert len(vectors) == 4 * LAYERS
    assert {p.dtype for p in vectors} == {torch.float32}
    y = unet(torch.randn(1, 4, 8, 8, dtype=dtype), 5, torch.randn(1, 5, 12, dtype=dtype)).sample
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vectors)
    assert sum(p.grad.abs().sum() for p in vectors) > 0


def test_unet_compiles_whole():
    unet = one_block_unet()
    unet.add_adapter(config(variant="ether_plus"))
    expected = run(unet)
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled), expected)

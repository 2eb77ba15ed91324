"""Laws of Naive and magnitude layers: outputs, gradients, merging, scales; against dense weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ether_diffusion.models.quantized import QUANTIZERS
from support.dense import layer_output
from support.layers import LAYERS, random_input
from support.optional import needs
from support.tuner_layers import METHODS, config, dense_weight, trained, wrap

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*cast from.*float16.*"),
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 0.35, 0.0, -1.5])
def test_output_gradients_and_merged_weight_are_those_of_the_dense_form(method, kind, scale):
    base = LAYERS[kind]().double()
    layer = wrap(method, base)
    layer.set_scale("default", scale)
    x = random_input(base).requires_grad_()
    inputs = [x, trained(layer)]
    y, adapted = layer(x), dense_weight(layer, base.weight, scale=scale)
    expected = layer_output(base, x, adapted)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, g)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, g), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.get_delta_weight("default"), adapted - base.weight, rtol=0, atol=1e-12)
    before = base.weight.clone()
    layer.merge()
    torch.testing.assert_close(base.weight, adapted, rtol=0, atol=1e-12)
    layer.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(method, kind, dtype):
    base = LAYERS[kind]().to(dtype)
    x = random_input(base, dtype)
    before, weight = base(x), base.weight.clone()
    layer = wrap(method, base, init_weights=True)
    assert torch.equal(layer(x), before)
    layer.merge()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_merged_output_equals_unmerged_in_the_inputs_dtype(method, kind, dtype, atol):
    base = LAYERS[kind]().to(dtype)
    layer = wrap(method, base)
    assert trained(layer).dtype == torch.float32
    x: Any = random_input(base, dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    gradient: Any = trained(layer).grad
    assert (y.dtype, x.grad.dtype, gradient.dtype) == (dtype, dtype, torch.float32)
    layer.merge()
    assert base.weight.dtype == dtype
    torch.testing.assert_close(layer(x), y, rtol=0, atol=atol)


def test_several_adapters_apply_in_their_order_at_their_scales(method):
    base = nn.Linear(12, 8).double()
    layer = wrap(method, base, "a")
    layer.update_layer("b", config(method), "layer")
    layer.set_scale("a", 0.6)
    x = random_input(base)
    for order in (["a", "b"], ["b", "a"]):
        layer.set_adapter(order)
        adapted = base.weight
        for name in order:
            adapted = dense_weight(layer, adapted, name, layer.scaling[name])
        torch.testing.assert_close(layer(x), layer_output(base, x, adapted), rtol=0, atol=1e-12)
        layer.merge()
        torch.testing.assert_close(base.weight, adapted, rtol=0, atol=1e-12)
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_error_is_that_of_the_base_layer_alone(method, dtype):
    base = nn.Linear(256, 256)
    base.weight.data = base.weight.data.to(dtype).float()  # so that all error is of the activations
    layer = wrap(method, base)
    x = torch.randn(64, 256)
    with torch.autocast("cpu", dtype):
        y, plain = layer(x), base(x)
        loss = layer(x).float().pow(2).sum()
    assert y.dtype == plain.dtype == dtype
    exact = layer_output(base, x, dense_weight(layer, base.weight))
    plain_error = (plain - layer_output(base, x, base.weight.double())).abs().mean()
    assert (y - exact).abs().mean() < 1.8 * plain_error
    (gradient,) = torch.autograd.grad(loss, trained(layer))
    (expected,) = torch.autograd.grad(exact.pow(2).sum(), trained(layer))
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_gets_its_input_in_the_memory_format_that_it_came_in(method, memory_format):
    base = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 16, 16).to(memory_format=memory_format)
    before, seen = base(x), []
    base.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    assert torch.equal(wrap(method, base, init_weights=True)(x), before)
    assert seen == [x.stride()]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_quantised_layer_is_adapted_and_merging_into_it_is_refused(method, kind):
    needs(kind.split("_")[0])
    base = QUANTIZERS[kind](nn.Linear(96, 64), torch.device("cpu"))
    layer = wrap(method, base)
    x = torch.randn(3, 96)
    if method == "magnitude":
        expected = base.bias + (1 + trained(layer)) * (base(x) - base.bias)
    else:
        expected = base(x @ torch.block_diag(*(torch.eye(24) + block for block in trained(layer))))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=5e-2 if "8bit" in kind else 1e-5)
    with pytest.raises(ValueError, match=r"is quantised\. Generate without merging"):
        layer.merge()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(method, use_reentrant):
    layer = wrap(method, nn.Linear(12, 8))
    inputs: Any = [random_input(layer.base_layer, torch.float32).requires_grad_(), trained(layer)]
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        for tensor in inputs:
            tensor.grad = None
        run(inputs[0]).square().sum().backward()
        gradients.append([tensor.grad.clone() for tensor in inputs])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_torch_compile_traces_the_whole_layer(method):
    layer = wrap(method, nn.Linear(12, 8))
    layer.set_scale("default", 0.5)
    x = random_input(layer.base_layer, torch.float32).requires_grad_()
    y = layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y)
    gradients = [torch.autograd.grad(out.square().sum(), [x, trained(layer)]) for out in (compiled, y)]
    torch.testing.assert_close(*gradients)


def test_forward_never_reads_the_base_weight_and_a_copy_is_independent(method):
    layer = wrap(method, nn.Linear(12, 8))
    x = random_input(layer.base_layer, torch.float32)
    twin, expected = copy.deepcopy(layer), layer(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        trained(twin).normal_()
    assert torch.equal(layer(x), expected)
    shape = layer.base_layer.weight.shape
    layer.base_layer.forward = lambda x, w=layer.base_layer.weight: nn.functional.linear(x, w, layer.base_layer.bias)
    layer.base_layer.weight = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
    assert torch.equal(layer(x), expected)

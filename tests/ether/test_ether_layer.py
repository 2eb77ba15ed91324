"""Laws of the adapted layers: outputs, gradients, merging, scales, several adapters; against dense float64 weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ether_diffusion import EtherConfig
from support import dense
from support.ether_layers import VARIANTS, wrap
from support.layers import LAYERS, random_input

pytestmark = pytest.mark.filterwarnings("ignore:.*symmetric initialization.*")


def matrices(layer, name="default"):
    return dense.matrix_of(layer.ether_in[name]), dense.matrix_of(
        layer.ether_out[name]
    ) if name in layer.ether_out else None


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_output_and_gradients_are_those_of_the_dense_form(kind, variant, sides, blocks):
    base = LAYERS[kind]().double()
    layer = wrap(base, variant=variant, sides=sides, num_blocks=blocks)
    x = random_input(base).requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(inputs) == 1 + {"ether": 1, "ether_plus": 2}[variant] * {"in": 1, "both": 2}[sides]
    y = layer(x)
    expected = dense.layer_output(base, x, dense.weight(base.weight, *matrices(layer)))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "conv 1x1"])
def test_ether_with_one_block_is_peft_hra_with_one_reflection(kind):
    base = nn.Sequential(LAYERS[kind]())
    x = random_input(base[0], torch.float32)
    ours: Any = get_peft_model(copy.deepcopy(base), EtherConfig(variant="ether", target_modules=["0"]))
    theirs: Any = get_peft_model(copy.deepcopy(base), HRAConfig(r=1, target_modules=["0"]))
    ours_u = ours.base_model.model[0].ether_in["default"].u
    theirs_u = theirs.base_model.model[0].hra_u["default"]
    with torch.no_grad():
        theirs_u.copy_(ours_u.T)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), ours_u)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), theirs_u)
    torch.testing.assert_close(grad, expected_grad.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sides", ["in", "both"])
def test_ether_plus_changes_no_bit_at_the_start(kind, dtype, sides):
    base = LAYERS[kind]().to(dtype)
    x = random_input(base, dtype)
    before = base(x)
    layer = wrap(base, variant="ether_plus", sides=sides, num_blocks=2, init_weights=True)
    assert torch.equal(layer(x), before)
    weight = base.weight.clone()
    layer.merge()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_gets_its_input_in_the_memory_format_that_it_came_in(memory_format):
    """Another one makes the convolution take another kernel, which rounds otherwise: not the base at the start."""
    base = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 16, 16).to(memory_format=memory_format)
    before = base(x)
    seen = []
    base.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    layer = wrap(base, variant="ether_plus", sides="both", init_weights=True)
    assert torch.equal(layer(x), before)
    assert seen == [x.stride()]


@pytest.mark.parametrize("way", ["unbatched", "vmap", "vmap over batches"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_convolution_without_a_batch_transforms_its_channels(way, blocks):
    """Height and channels are equal, so that the wrong dimension would not be noticed by its size."""
    base = LAYERS["conv 3x3 without bias"]().double()
    layer = wrap(base, variant="ether_plus", num_blocks=blocks)
    x = torch.randn(2, 3, 12, 12, 12, dtype=torch.float64)
    expected = torch.stack([layer(batch) for batch in x])
    runs = {
        "unbatched": lambda: torch.stack([torch.stack([layer(one) for one in batch]) for batch in x]),
        "vmap": lambda: torch.stack([torch.func.vmap(layer)(batch) for batch in x]),
        "vmap over batches": lambda: torch.func.vmap(layer)(x),
    }
    torch.testing.assert_close(runs[way](), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init_weights", [True, False])
def test_ether_starts_at_a_random_reflection(init_weights):
    base = nn.Linear(12, 8)
    x = random_input(base, torch.float32)
    layer = wrap(base, variant="ether", init_weights=init_weights)
    assert not torch.allclose(layer(x), base(x), atol=1e-2)


def test_vectors_start_uniform_within_one_over_the_root_of_the_block_width():
    u = wrap(nn.Linear(4096, 4), variant="ether", num_blocks=4, init_weights=True).ether_in["default"].u
    assert u.abs().max() <= 1 / 32
    assert u.std().item() == pytest.approx(1 / 32 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.35, 0.0, -1.5])
def test_scale_interpolates_the_weight_in_forward_and_merge(kind, variant, sides, scale):
    base = LAYERS[kind]().double()
    layer = wrap(base, variant=variant, sides=sides, num_blocks=2)
    layer.set_scale("default", scale)
    x = random_input(base)
    adapted = dense.weight(base.weight, *matrices(layer), scale=scale)
    torch.testing.assert_close(layer(x), dense.layer_output(base, x, adapted), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.get_delta_weight("default"), adapted - base.weight, rtol=0, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(base.weight, adapted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "a"], ["b", "a"]])
def test_several_adapters_apply_in_their_order_at_their_scales(kind, order):
    base = LAYERS[kind]().double()
    layer = wrap(base, "a", variant="ether_plus")
    layer.update_layer("b", EtherConfig(variant="ether", num_blocks=2), "layer")
    layer.update_layer("c", EtherConfig(variant="ether", sides="both", num_blocks=4), "layer")
    scales = {"a": 0.6, "b": 1.0, "c": 0.3}
    for name, scale in scales.items():
        layer.set_scale(name, scale)
    layer.set_adapter(order)
    x = random_input(base)
    adapted = base.weight
    for name in order:
        adapted = dense.weight(adapted, *matrices(layer, name), scale=scales[name])
    torch.testing.assert_close(layer(x), dense.layer_output(base, x, adapted), rtol=0, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(base.weight, adapted, rtol=0, atol=1e-12)
    assert layer.merged_adapters == order


def test_adapters_do_not_commute():
    base = nn.Linear(12, 8).double()
    layer = wrap(base, "a")
    layer.update_layer("b", EtherConfig(init_weights=False), "layer")
    x = random_input(base)
    outputs = []
    for order in (["a", "b"], ["b", "a"]):
        layer.set_adapter(order)
        outputs.append(layer(x))
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_merged_output_equals_unmerged_and_unmerge_restores_every_bit(kind, dtype, atol):
    base = LAYERS[kind]().to(dtype)
    layer = wrap(base, variant="ether_plus", num_blocks=2)
    x = random_input(base, dtype)
    weight, expected = base.weight.clone(), layer(x)
    layer.merge()
    assert layer.merged
    assert base.weight.dtype == dtype
    assert not torch.equal(base.weight, weight)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=atol)
    layer.unmerge()
    assert torch.equal(base.weight, weight)
    assert torch.equal(layer(x), expected)


def test_unmerge_restores_every_bit_where_the_transform_is_singular():
    base = nn.Linear(12, 8)
    layer = wrap(base, variant="ether_plus", sides="both")
    with torch.no_grad():
        for planes in (layer.ether_in["default"], layer.ether_out["default"]):
            planes.u.zero_()[0, 0] = 1
            planes.v.zero_()[0, 1] = 1
    weight = base.weight.clone()
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default") + weight) < 8
    layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, weight)


def test_second_merge_warns_and_does_nothing():
    base = nn.Linear(12, 8)
    layer = wrap(base)
    layer.merge()
    merged = base.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(base.weight, merged)
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_adapter_merged_later_follows_the_one_merged_first_and_both_unmerge():
    base = nn.Linear(12, 8).double()
    layer = wrap(base, "a")
    layer.update_layer("b", EtherConfig(init_weights=False), "layer")
    weight = base.weight.clone()
    adapted = dense.weight(dense.weight(weight, *matrices(layer, "b")), *matrices(layer, "a"))
    layer.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="additionally merging a"):
        layer.merge(adapter_names=["a"])
    torch.testing.assert_close(base.weight, adapted, rtol=0, atol=1e-12)
    layer.unmerge()
    assert torch.equal(base.weight, weight)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight():
    base = nn.Linear(12, 8)
    layer = wrap(base)
    with torch.no_grad():
        layer.ether_in["default"].u[0, 0] = torch.nan
    weight = base.weight.clone()
    with pytest.raises(ValueError, match="not finite: adapter default"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.weight, weight)
    assert not layer.merged


@pytest.mark.parametrize(
    ("base_dtype", "vector_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_vectors_have_at_least_single_precision(base_dtype, vector_dtype):
    layer = wrap(nn.Linear(12, 8).to(base_dtype), variant="ether_plus")
    assert {p.dtype for side in (layer.ether_in, layer.ether_out) for p in side.parameters()} == {vector_dtype}


@pytest.mark.parametrize("kind", ["linear", "conv 3x3 strided, padded, dilated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_and_input_gradient_keep_the_inputs_dtype(kind, dtype):
    base = LAYERS[kind]().to(dtype)
    layer = wrap(base, variant="ether_plus", num_blocks=2)
    x: Any = random_input(base, dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_error_is_that_of_the_base_layer_alone(dtype, base_dtype):
    base = nn.Linear(256, 256)
    base.weight.data = base.weight.data.to(dtype).float()  # so that all error is of the activations
    base.to(base_dtype)
    layer = wrap(base, variant="ether_plus", num_blocks=4)
    x = torch.randn(64, 256)
    weight = base.weight.double()
    with torch.autocast("cpu", dtype):
        y, plain = layer(x), base(x)
        half_dots = layer(x.to(dtype))
    assert y.dtype == plain.dtype == dtype
    exact = dense.layer_output(base, x, dense.weight(weight, *matrices(layer)))
    plain_error = (plain - dense.layer_output(base, x, weight)).abs().mean().item()
    assert (y - exact).abs().mean().item() < 1.6 * plain_error
    assert (half_dots - exact).abs().mean().item() < 1.8 * plain_error


def test_under_autocast_gradients_of_the_vectors_are_single_precision_sums():
    base = nn.Linear(256, 256)
    layer = wrap(base, variant="ether_plus")
    x = torch.randn(512, 256)
    vectors = [p for p in layer.parameters() if p.requires_grad]
    exact = torch.autograd.grad(
        dense.layer_output(base, x, dense.weight(base.weight, *matrices(layer))).pow(2).sum(), vectors
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().pow(2).sum()
    for gradient, expected in zip(torch.autograd.grad(loss, vectors), exact, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, dtype):
    base = nn.Linear(12, 8).to(dtype)
    layer = wrap(base, variant="ether_plus", num_blocks=2)
    x = random_input(base, dtype).requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        for t in inputs:
            t.grad = None
        run(x).float().square().sum().backward()
        gradients.append([t.grad.clone() for t in inputs])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(("kind", "blocks"), [("linear", 1), ("conv 3x3 strided, padded, dilated", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_traces_the_whole_layer(kind, blocks, dtype):
    base = LAYERS[kind]().to(dtype)
    layer = wrap(base, variant="ether_plus", num_blocks=blocks)
    layer.set_scale("default", 0.5)
    x = random_input(base, dtype).requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs, g), torch.autograd.grad(y, inputs, g))


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_is_independent(merged):
    layer = wrap(nn.Linear(12, 8))
    x = random_input(layer.base_layer, torch.float32)
    weight = layer.base_layer.weight.clone()
    if merged:
        layer.merge()
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.ether_in["default"].u.normal_()
    if merged:
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, weight)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and func is not torch.ops.aten.t.default:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
@pytest.mark.parametrize("blocks", [1, 8, 512])
def test_training_builds_nothing_of_the_weights_size(variant, sides, blocks):
    layer = wrap(nn.Linear(1024, 2048), variant=variant, sides=sides, num_blocks=blocks)
    x = torch.randn(3, 1024, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).square().sum().backward()
    assert 3 * 2048 <= largest.numel <= 3 * 2 * 2048


def test_forward_never_reads_the_base_weight():
    class Sealed(nn.Linear):
        """A layer whose weight is there only while it runs itself, as an offloaded one's."""

        running = True

        def forward(self, input):
            self.running = True
            try:
                return super().forward(input)
            finally:
                self.running = False

        def __getattr__(self, name):
            if name == "weight" and not self.running:
                raise AssertionError("the adapter reads the base weight")
            return super().__getattr__(name)

    base = Sealed(12, 8)
    layer = wrap(base)
    base.running = False
    x = random_input(base, torch.float32).requires_grad_()
    layer.set_scale("default", 0.5)
    layer(x).sum().backward()
    assert x.grad is not None


def test_trainable_bias_gets_the_gradient_of_the_dense_form():
    base = nn.Linear(12, 8).double()
    layer = wrap(base, variant="ether_plus")
    base.bias.requires_grad_()
    x = random_input(base)
    expected = dense.layer_output(base, x, dense.weight(base.weight, *matrices(layer)))
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), base.bias)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.pow(3).sum(), base.bias)[0])

"""ETHER on layers that bitsandbytes and torchao have quantised: the dense formula on what their weights stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.quantized import QUANTIZERS, dequantized, quantize
from support import dense
from support.ether_layers import wrap
from support.layers import Mlp
from support.optional import needs

# LLM.int8() rounds activations too: an output is within a hundredth of the exact one, not within rounding.
ATOL = {"bitsandbytes_4bit": 1e-5, "bitsandbytes_8bit": 5e-2, "torchao_int8": 1e-5}
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*cast from.*float16.*")


@pytest.fixture(params=list(QUANTIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    needs(request.param.split("_")[0])
    return request.param


def quantised(kind: str, features: tuple[int, int] = (96, 64), dtype: torch.dtype = torch.float32) -> Any:
    return QUANTIZERS[kind](nn.Linear(*features).to(dtype), CPU)


def exact_weight(layer: Any) -> Tensor:
    """(out, in), by the library's own function."""
    if "4bit" in type(layer).__name__:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if "8bit" in type(layer).__name__:
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scales[:, None] / 127
    return dequantized(layer.weight)


def exact_output(layer: Any, x: Tensor) -> Tensor:
    adapter_in, adapter_out = layer.ether_in["default"], layer.ether_out
    h_out = dense.matrix_of(adapter_out["default"]) if "default" in adapter_out else None
    weight = dense.weight(exact_weight(layer.base_layer), dense.matrix_of(adapter_in), h_out, layer.scaling["default"])
    return x.double() @ weight.T + layer.base_layer.bias.double()


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize(("variant", "sides"), [("ether", "in"), ("ether_plus", "both")])
def test_output_is_the_dense_formula_on_the_dequantised_weight(kind, variant, sides, scale):
    layer = wrap(quantised(kind), variant=variant, sides=sides, num_blocks=4)
    layer.set_scale("default", scale)
    x = torch.randn(2, 5, 96)
    expected = exact_output(layer, x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=ATOL[kind])
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x).double(), expected, rtol=0, atol=ATOL[kind])


def test_gradients_are_those_of_the_dense_formula(kind):
    layer = wrap(quantised(kind), variant="ether_plus", num_blocks=2)
    x = torch.randn(4, 96, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    g = torch.randn(4, 64)
    exact = torch.autograd.grad(exact_output(layer, x), inputs, g.double())
    for gradient, expected in zip(torch.autograd.grad(layer(x), inputs, g), exact, strict=True):
        assert (gradient - expected).norm() < max(1e-5, ATOL[kind]) * expected.norm()


def test_sizes_are_the_layers_and_not_those_of_its_packed_weight(kind):
    layer = wrap(quantised(kind, (24, 36)), variant="ether_plus", num_blocks=3)
    assert layer.ether_in["default"].u.shape == (3, 8)
    assert layer.ether_out["default"].u.shape == (3, 12)
    assert {p.dtype for p in layer.ether_in.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_refused_with_the_remedy_and_nothing_changes(kind, dtype):
    layer = wrap(quantised(kind, dtype=dtype), variant="ether_plus")
    x = torch.randn(3, 96, dtype=dtype)
    before = layer(x)
    for merge_it in (layer.merge, lambda: layer.get_delta_weight("default")):
        with pytest.raises(ValueError, match=r"is quantised\. Generate without merging; or load the base unquantised"):
            merge_it()
    assert not layer.merged
    assert torch.equal(layer(x), before)


def test_four_bits_stored_as_halves_are_recognised_as_quantised():
    bnb = needs("bitsandbytes")
    base = bnb.nn.Linear4bit(96, 64, compute_dtype=torch.float32, quant_type="nf4", quant_storage=torch.bfloat16)
    layer = wrap(base.to("cpu"), variant="ether_plus")
    assert base.weight.is_floating_point()
    with pytest.raises(ValueError, match="is quantised"):
        layer.merge()


@pytest.mark.parametrize("method", ["ether", "ether_plus", "lora"])
def test_a_model_with_one_quantised_layer_stays_whole_where_a_merge_is_refused(kind, method):
    unet: Any = load_base("tiny").unet
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_k = QUANTIZERS[kind](attention.to_k, CPU)
    attach(unet, METHODS[method](target=["to_q", "to_k"]))
    weight = attention.to_q.base_layer.weight.clone()
    with pytest.raises(UserError, match=r"^mid_block\.attentions.*attn1\.to_k: Cannot merge .* is quantised"):
        merge(unet)
    assert torch.equal(attention.to_q.base_layer.weight, weight)
    assert not attention.to_q.merged


def test_training_lowers_the_loss_and_changes_only_the_vectors(kind):
    model = Mlp()
    quantize(model, kind)
    model = get_peft_model(model, EtherConfig(variant="ether_plus", target_modules=["lin0", "lin1"]))
    frozen = {n: dequantized(p.detach()).clone() for n, p in model.named_parameters() if not p.requires_grad}
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(vectors) == 8
    x, target = torch.randn(64, 16), torch.randn(64, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(dequantized(parameters[n].detach()), value) for n, value in frozen.items())
    assert not any(torch.equal(parameters[n], value) for n, value in vectors.items())


def test_an_evaluation_pass_leaves_training_as_it_was(kind):
    """bitsandbytes repacks weights for inference on some CPUs; training has to go on after a validation."""
    layer = wrap(quantised(kind, (128, 128), torch.bfloat16), variant="ether_plus")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    before = layer.train()(x)
    with torch.no_grad():
        layer.eval()(x)
    after = layer.train()(x)
    assert torch.equal(after, before)
    after.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)


def test_quantising_under_an_adapter_is_refused(kind):
    model: Any = get_peft_model(Mlp(), EtherConfig(target_modules=["lin0"])).base_model.model
    with pytest.raises(UserError, match="quantise the base before an adapter is attached"):
        quantize(model, kind)

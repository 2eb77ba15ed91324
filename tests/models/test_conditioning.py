"""The conditioned UNet: the hint is added once, to its own image, and the UNet is unchanged afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ether_diffusion.adapters.attach import attach, merge, trainable_parameters
from ether_diffusion.adapters.methods import EtherPlusSettings, LoraSettings
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import ConditionEncoder, build_condition_encoder
from ether_diffusion.models.conditioning import ConditionedUNet, added_features
from support.unets import fast_compiling_unet

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def unet() -> Any:
    return load_base("tiny").unet


@pytest.fixture
def small_unet() -> UNet2DConditionModel:
    """The least UNet of the kind: what is compiled, or started in processes of its own, is done sooner."""
    return fast_compiling_unet()


@pytest.fixture
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(0)
    latents, hidden = torch.randn(3, 8, 16, 16, generator=g), torch.randn(3, 77, 128, generator=g)
    return latents, torch.tensor([1, 400, 999]), hidden


@pytest.fixture
def hint() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def nonzero_encoder(unet: nn.Module) -> ConditionEncoder:
    """An encoder whose features are not zero."""
    encoder = build_condition_encoder(unet, 4)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return encoder


def adapted(unet: nn.Module) -> None:
    """Attach ETHER+ as if it were trained."""
    attach(unet, EtherPlusSettings(target="attention+geglu"))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(unet).values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.5)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# What is added, and where


@torch.no_grad()
def test_step_zero_with_ether_plus_is_the_base_bit_for_bit(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    base = unet(*inputs).sample
    attach(unet, EtherPlusSettings(target="attention+geglu"))
    assert torch.equal(ConditionedUNet(unet, build_condition_encoder(unet, 4))(*inputs, hint), base)


@torch.no_grad()
@pytest.mark.parametrize("settings", [None, EtherPlusSettings(target=["conv_in"]), LoraSettings(target=["conv_in"])])
def test_features_are_added_once_after_the_first_convolution(
    unet: Any, inputs: Inputs, hint: Tensor, settings: Any
) -> None:
    """After the adapter on it, too: ETHER does not reflect the features."""
    if settings is not None:
        attach(unet, settings)
        torch.nn.init.normal_(list(trainable_parameters(unet).values())[-1])
    encoder, seen = nonzero_encoder(unet), {}
    unet.conv_in.register_forward_hook(lambda module, args, output: seen.update(convolution=output))
    unet.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(block=kwargs["hidden_states"]), with_kwargs=True
    )
    ConditionedUNet(unet, encoder)(*inputs, hint)
    features = encoder(hint)
    assert features.abs().max() > 0.01
    assert torch.equal(seen["block"], seen["convolution"] + features)


@torch.no_grad()
def test_constant_features_are_a_bias_of_the_convolution(unet: Any, inputs: Inputs) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with added_features(unet, vector[None, :, None, None].expand(3, 64, 16, 16)):
        conditioned = unet(*inputs).sample
    unet.conv_in.bias += vector
    torch.testing.assert_close(conditioned, unet(*inputs).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_zero_features_and_none_change_nothing(unet: Any, inputs: Inputs) -> None:
    base = unet(*inputs).sample
    for features in (torch.zeros(3, 64, 16, 16), None):
        with added_features(unet, features):
            assert torch.equal(unet(*inputs).sample, base)


@torch.no_grad()
def test_a_hint_stays_with_its_image_in_any_batch(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    model = ConditionedUNet(unet, nonzero_encoder(unet))
    together = model(*inputs, hint)
    order = [2, 0, 1]
    shuffled = model(*(part[order] for part in inputs), hint[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-4)
    for k in range(3):
        alone = model(*(part[k : k + 1] for part in inputs), hint[k : k + 1])
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(*inputs, hint[order]), together, atol=1e-2)


@torch.no_grad()
def test_features_are_added_in_every_branch_of_guidance(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    latents, timesteps, hidden = inputs
    branches = hidden.flip(0), hidden
    with added_features(unet, nonzero_encoder(unet)(hint)):
        both = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat(branches)).sample
        for part, branch in zip(both.chunk(2), branches, strict=True):
            torch.testing.assert_close(part, unet(latents, timesteps, branch).sample, rtol=1e-4, atol=1e-4)


# Afterwards


@torch.no_grad()
def test_the_unet_is_unchanged_afterwards(unet: Any, inputs: Inputs) -> None:
    base, convolution, keys = unet(*inputs).sample, unet.conv_in, list(unet.state_dict())
    features = torch.randn(3, 64, 16, 16)
    with added_features(unet, features):
        assert not torch.equal(unet(*inputs).sample, base)
    with pytest.raises(KeyboardInterrupt), added_features(unet, features):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not a whole number of them"), added_features(unet, features[:2]):
        unet(*inputs)
    with pytest.raises(ValueError, match=r"\(3, 64, 8, 16\)"), added_features(unet, features[:, :, :8]):
        unet(*inputs)
    assert unet.conv_in is convolution
    assert list(unet.state_dict()) == keys
    assert torch.equal(unet(*inputs).sample, base)


def test_features_are_never_added_twice(unet: Any) -> None:
    features = torch.zeros(1, 64, 16, 16)
    with (
        added_features(unet, features),
        pytest.raises(RuntimeError, match="added once"),
        added_features(unet, features),
    ):
        pass


def test_training_the_encoder_alone_does_not_change_the_unet(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    model = ConditionedUNet(unet, build_condition_encoder(unet, 4))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), 1e-3)
    for _ in range(2):  # the first step changes the zero convolution alone, which passes no gradient
        model(*inputs, hint).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("condition_encoder.")}


# Memory, precision, compilation, processes


def test_gradient_checkpointing_changes_no_gradient(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    adapted(unet)
    model = ConditionedUNet(unet, nonzero_encoder(unet)).train()
    model(*inputs, hint).square().mean().backward()
    expected = gradients(model)
    assert {name.split(".")[0] for name in expected} == {"unet", "condition_encoder"}
    model.zero_grad()
    unet.enable_gradient_checkpointing()
    model.condition_encoder.enable_gradient_checkpointing()
    model(*inputs, hint).square().mean().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_merged_adapters_get_the_same_hint(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    base = ConditionedUNet(unet, nonzero_encoder(unet))(*inputs, hint)
    adapted(unet)
    model = ConditionedUNet(unet, nonzero_encoder(unet))
    attached = model(*inputs, hint)
    merge(unet)
    torch.testing.assert_close(model(*inputs, hint), attached, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(base, attached, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "install",
    [
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: unet.set_attention_slice("max"),
    ],
    ids=["plain", "sliced"],
)
def test_any_attention_processor(unet: Any, inputs: Inputs, hint: Tensor, install: Callable[[Any], None]) -> None:
    model = ConditionedUNet(unet, nonzero_encoder(unet))
    expected = model(*inputs, hint)
    install(unet)
    torch.testing.assert_close(model(*inputs, hint), expected, rtol=1e-3, atol=1e-3)


def test_a_half_precision_unet_with_an_encoder_in_full_precision(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    latents, timesteps, hidden = inputs
    encoder = nonzero_encoder(unet)
    expected = ConditionedUNet(unet, encoder)(*inputs, hint).detach()
    model = ConditionedUNet(unet.bfloat16(), encoder)
    prediction = model(latents.bfloat16(), timesteps, hidden.bfloat16(), hint.bfloat16())
    assert prediction.dtype == torch.bfloat16
    assert (prediction.float() - expected).norm() < 0.05 * expected.norm()
    prediction.float().square().mean().backward()
    for gradient in gradients(encoder).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("backend", "adapter"),
    [("eager", False), pytest.param("aot_eager", True, marks=pytest.mark.slow)],
    ids=["the encoder", "the encoder and an adapter"],
)
def test_compiled_as_one_graph(small_unet: Any, inputs: Inputs, hint: Tensor, backend: str, adapter: bool) -> None:
    if adapter:
        adapted(small_unet)
    model = ConditionedUNet(small_unet, nonzero_encoder(small_unet))
    plain = model(*inputs, hint)
    plain.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)(*inputs, hint)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    compiled.square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert gradients(model).keys() == expected.keys()


@torch.no_grad()
def test_a_unet_that_was_compiled_without_a_hint_gets_it(small_unet: Any, inputs: Inputs, hint: Tensor) -> None:
    """torch.compile ignores hooks that are added after it: `skip_nnmodule_hook_guards` is its default."""
    torch.compiler.reset()
    compiled: Any = torch.compile(small_unet, backend="eager", fullgraph=True)
    features = nonzero_encoder(small_unet)(hint)
    base = small_unet(*inputs).sample
    assert torch.equal(compiled(*inputs).sample, base)
    for strength in (1.0, 2.0):
        with added_features(compiled, features * strength):
            conditioned = compiled(*inputs).sample
            assert torch.equal(conditioned, small_unet(*inputs).sample)
        assert not torch.equal(conditioned, base)
    assert torch.equal(compiled(*inputs).sample, base)


@torch.no_grad()
def test_a_unet_in_a_peft_model(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    expected = ConditionedUNet(unet, nonzero_encoder(unet))(*inputs, hint)
    wrapped = get_peft_model(unet, EtherPlusSettings().peft_config())
    assert torch.equal(ConditionedUNet(wrapped, nonzero_encoder(unet))(*inputs, hint), expected)


def _mean_gradients_of_two_processes(rank: int, folder: str, inputs: Inputs, hint: Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    unet = fast_compiling_unet()
    adapted(unet)
    model = ConditionedUNet(unet, nonzero_encoder(unet))
    parallel, mine = DistributedDataParallel(model), slice(rank, rank + 1)
    for _ in range(2):  # a parameter without a gradient would stop the second
        model.zero_grad()
        parallel(*(part[mine] for part in inputs), hint[mine]).square().mean().backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_one_process(
    small_unet: Any, inputs: Inputs, hint: Tensor, tmp_path: Path
) -> None:
    mp.spawn(_mean_gradients_of_two_processes, (str(tmp_path), inputs, hint), nprocs=2)  # pyright: ignore
    adapted(small_unet)
    model = ConditionedUNet(small_unet, nonzero_encoder(small_unet))
    model(*(part[:2] for part in inputs), hint[:2]).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = gradients(model)
    assert first.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, rtol=1e-3, atol=1e-6)

"""Laws that hold for every method of the table: how it starts, trains, is saved, loaded, scaled and merged."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from ether_diffusion.adapters.attach import attach, detach, inject, merge, meta_copy, set_scale, trainable_parameters
from ether_diffusion.adapters.loading import fill_adapter, load_adapter
from ether_diffusion.adapters.methods import METHODS, method_title
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.adapters.saving import adapter_state, save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.quantized import QUANTIZERS, quantize
from support.adapted_unets import ADAPTERS, inputs, move, moved_unet, sample, settings_of
from support.optional import needs
from support.unets import one_block_unet

pytestmark = [pytest.mark.parametrize("method", ADAPTERS), pytest.mark.filterwarnings("ignore::UserWarning")]


def test_it_starts_at_the_base_where_its_settings_say_so(method: str) -> None:
    unet = one_block_unet()
    before, settings = sample(unet), settings_of(method)
    matched = attach(unet, settings)
    assert len(matched) == 8
    assert torch.allclose(sample(unet), before, atol=1e-5) == settings.starts_at_base


def test_initial_values_depend_on_the_seed_alone(method: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))  # the global generator has no say, and is left as it was
        before, unet = torch.get_rng_state(), one_block_unet()
        attach(unet, settings_of(method), seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append([parameter.clone() for parameter in trainable_parameters(unet).values()])
    first, again, other = states
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    random = any(len(parameter.unique()) > 2 for parameter in first)
    assert random == any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_train_the_adapter_alone_and_in_fp32(method: str, dtype: torch.dtype) -> None:
    unet = one_block_unet(dtype).train().requires_grad_(True)
    base = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    attach(unet, settings_of(method))
    trained = trainable_parameters(unet)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    start = {name: parameter.clone() for name, parameter in trained.items()}
    target, losses = torch.zeros(2, 4, 8, 8), []
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        loss = (unet(*inputs(dtype)).sample.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # In bfloat16, rounding hides what two steps of the gentlest method gain.
    assert losses[1] < losses[0] * (1 if dtype == torch.float32 else 1.005)
    assert all(not torch.equal(parameter, start[name]) for name, parameter in trained.items())
    detach(unet)
    assert all(torch.equal(parameter, base[name]) for name, parameter in unet.named_parameters())


def test_saved_and_loaded_it_is_the_same(method: str, tmp_path: Path) -> None:
    unet = moved_unet(method)
    expected = sample(unet)
    assert not torch.allclose(expected, sample(one_block_unet()), atol=1e-4)
    folder = save_adapter(unet, tmp_path / "adapter", base_model="tiny")
    torch.manual_seed(9)
    before, loaded = torch.get_rng_state(), one_block_unet()
    saved = load_adapter(loaded, folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sample(loaded), expected)
    assert saved.parameters == sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    assert saved.method == METHODS[method].title == method_title(saved.config)
    card = (folder / "README.md").read_text()
    assert f"# {METHODS[method].title} adapter" in card
    assert METHODS[method].paper in card
    other = PeftModel.from_pretrained(one_block_unet(), str(folder))
    with torch.no_grad():
        assert torch.equal(other(*inputs()).sample, expected)


def test_a_file_that_lacks_a_tensor_changes_nothing(method: str, tmp_path: Path) -> None:
    folder = save_adapter(moved_unet(method), tmp_path / "adapter", base_model="tiny")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    unet = one_block_unet()
    with pytest.raises(UserError, match=r"1 missing, e\.g\."):
        load_adapter(unet, folder)
    assert not hasattr(unet, "peft_config")


def test_a_saved_adapter_fills_one_that_is_attached(method: str, tmp_path: Path) -> None:
    """As `init_from` and resuming do: into an adapter that is attached already, under the settings of another run."""
    unet = moved_unet(method)
    saved = read_adapter(save_adapter(unet, tmp_path / "adapter", base_model="tiny"))
    other = one_block_unet()
    attach(other, settings_of(method), seed=5)
    fill_adapter(other, saved)
    state = adapter_state(other)
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.tensors.items())
    assert torch.equal(sample(other), sample(unet))
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(other).values())


def test_merging_keeps_the_output_and_detaching_restores_the_base(method: str) -> None:
    unet = moved_unet(method)
    expected, names = sample(unet), [name for name, _ in one_block_unet().named_modules()]
    taken_out = copy.deepcopy(unet)
    detach(taken_out)
    assert torch.equal(sample(taken_out), sample(one_block_unet()))
    merge(unet)
    assert torch.allclose(sample(unet), expected, atol=1e-5)
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in taken_out.named_modules()] == names
    assert not hasattr(unet, "peft_config")


def test_a_scale_is_between_base_and_adapter_or_refused_in_one_line(method: str) -> None:
    unet, base = moved_unet(method), sample(one_block_unet())
    expected = sample(unet)
    unet.set_adapters("default", 1.0)  # diffusers'
    assert torch.equal(sample(unet), expected)
    if METHODS[method].has_scale:
        set_scale(unet, 0.0)
        assert torch.allclose(sample(unet), base, atol=1e-5)
        set_scale(unet, 0.5)
        half = sample(unet)
        assert not torch.allclose(half, expected, atol=1e-4)
        merge(unet)
        assert torch.allclose(sample(unet), half, atol=1e-5)
        return
    for setting in (lambda: set_scale(unet, 0.5), lambda: unet.set_adapters("default", 0.5)):
        with pytest.raises(UserError, match=rf"^scale: 0\.5, but {method} is defined as trained only; allowed: 1\.$"):
            setting()
    with pytest.raises(UserError, match=r"scale: 0\.5"), torch.no_grad():
        unet(*inputs(), cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(sample(unet), expected)


def test_its_facts_are_those_of_its_layers(method: str) -> None:
    facts, unet = METHODS[method], moved_unet(method)
    layers: list[Any] = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    can_be_scaled = all(isinstance(getattr(layer, "scaling", None), dict) for layer in layers)
    assert facts.has_scale == (can_be_scaled and method != "dora")  # DoRA's rows keep their trained lengths at scale 0
    state, trained = adapter_state(unet), sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    assert sum(tensor.numel() for key, tensor in state.items() if facts.is_trained(key)) == trained
    assert all(any(fnmatchcase(key, pattern) for key in state) for pattern in facts.frozen_keys)
    half = one_block_unet(torch.float16)
    inject(half, settings_of(method).peft_config(), "default")
    dtypes = {parameter.dtype for name, parameter in half.named_parameters() if parameter.requires_grad}
    assert (dtypes == {torch.float32}) or not facts.keeps_fp32


def test_a_base_in_half_precision_gives_nearly_the_same_output(method: str, tmp_path: Path) -> None:
    """The rounding error of bfloat16 is about that of the base alone."""
    unet = moved_unet(method)
    folder = save_adapter(unet, tmp_path / "adapter", base_model="tiny")
    rounding = (sample(one_block_unet(torch.bfloat16)).float() - sample(one_block_unet())).abs().max()
    half = one_block_unet(torch.bfloat16)
    load_adapter(half, folder)
    assert sample(half).dtype == torch.bfloat16
    assert (sample(half).float() - sample(unet)).abs().max() < 6 * rounding
    merge(half)
    assert (sample(half).float() - sample(unet)).abs().max() < 6 * rounding


@pytest.mark.slow  # the libraries take seconds to import
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_quantised_base_is_adapted_or_refused(method: str, kind: str, tmp_path: Path) -> None:
    needs(kind.split("_")[0])
    folder = save_adapter(moved_unet(method), tmp_path / "adapter", base_model="tiny")
    unet, other, settings = one_block_unet(), one_block_unet(), settings_of(method)
    quantize(unet, kind)
    quantize(other, kind)
    if METHODS[method].weight_problem(unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")):
        for put in (lambda: attach(unet, settings), lambda: load_adapter(unet, folder)):
            with pytest.raises(UserError, match=r"cannot adapt .*quantised"):
                put()
            assert not hasattr(unet, "peft_config")
        return
    before = sample(unet)
    attach(unet, settings)
    assert torch.allclose(sample(unet), before, atol=1e-5) == settings.starts_at_base
    unet(*inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(unet).values())
    load_adapter(other, folder)
    assert not torch.allclose(sample(other), before, atol=1e-4)


def test_it_runs_with_its_layers_offloaded_where_its_facts_say_so(method: str) -> None:
    unet = moved_unet(method).requires_grad_(False)
    expected = sample(unet)
    accelerate.cpu_offload(unet, torch.device("cpu"))  # as `enable_sequential_cpu_offload` does it
    if not METHODS[method].sequential_offload:
        with pytest.raises(RuntimeError, match="meta"), torch.no_grad():
            unet(*inputs())
        return
    with torch.no_grad():
        assert torch.equal(unet(*inputs()).sample, expected)


@pytest.mark.parametrize("target", ["conv1", "conv_shortcut"])  # 3x3 and 1x1
def test_a_convolution_is_adapted_or_refused_before_anything_changes(method: str, target: str) -> None:
    unet, before = one_block_unet(), sample(one_block_unet())
    settings = settings_of(method, target=[target])
    layers = [module for name, module in unet.named_modules() if name.endswith(target)]
    refused = next(filter(None, map(settings.layer_problem, layers)), None)
    if refused:
        with pytest.raises(UserError, match=rf"^adapter\.method: {method} cannot adapt .*: .*{refused[-20:]}.*\.$"):
            attach(unet, settings)
        assert not hasattr(unet, "peft_config")
        assert torch.equal(sample(unet), before)
        return
    attach(unet, settings)
    assert torch.allclose(sample(unet), before, atol=1e-5) == settings.starts_at_base
    move(unet)
    expected = sample(unet)
    assert not torch.allclose(expected, before, atol=1e-4)
    merge(unet)
    assert torch.allclose(sample(unet), expected, atol=2e-5)


def test_it_adapts_the_text_encoder(method: str) -> None:
    encoder = load_base("tiny").text_encoder
    ids = torch.arange(10).reshape(1, 10)
    with torch.no_grad():
        before = encoder(ids)[0]
    settings = settings_of(method).for_text_encoder()
    attach(meta_copy(encoder), settings)
    attach(encoder, settings)
    with torch.no_grad():
        assert torch.allclose(encoder(ids)[0], before, atol=1e-5) == settings.starts_at_base
    move(encoder)
    with torch.no_grad():
        assert not torch.allclose(encoder(ids)[0], before, atol=1e-4)

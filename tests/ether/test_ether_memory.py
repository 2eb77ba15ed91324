"""Ways to save memory with adapters in the UNet: offloading, attention slicing and backends. None changes an image."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from peft import get_peft_model
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS, EtherPlusSettings
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.adapters.saving import adapter_state, save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherLayer
from support.unets import fast_compiling_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapted_once() -> UNet2DConditionModel:
    """Adapters on both sides of every linear and convolution layer, those with biases among them."""
    torch.manual_seed(0)
    unet = fast_compiling_unet()
    names = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False, target_modules=names))
    return unet


@pytest.fixture
def unet(adapted_once: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(adapted_once)


def run(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, c = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 40, 128, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([7, 300]), c).sample


def offload(unet: nn.Module, way: str, folder: Path) -> None:
    """Every way to offload that accelerate and diffusers have, with the CPU in the accelerator's place."""
    if way == "accelerate, memory":
        accelerate.cpu_offload(unet, execution_device=CPU)
    elif way == "accelerate, disk":
        accelerate.disk_offload(unet, str(folder), execution_device=CPU)
    else:
        level, place = way.split(", ")
        options: dict[str, Any] = {"offload_type": level, "onload_device": CPU, "offload_device": CPU}
        if level == "block_level":
            options["num_blocks_per_group"] = 1
        apply_group_offloading(unet, offload_to_disk_path=str(folder) if place == "disk" else None, **options)


WAYS = [f"{level}, {place}" for level in ("accelerate", "leaf_level", "block_level") for place in ("memory", "disk")]


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_unet_gives_the_same_output(unet, tmp_path, way):
    expected = run(unet)
    offload(unet, way, tmp_path)
    for _ in range(2):
        # Weights that were read from a file lie at other addresses, and kernels round by address.
        torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)


def test_memory_left_by_group_offloading_is_not_read_as_a_bias(unet, tmp_path):
    """Between calls it is whatever lay in that memory: here, after NaN was put there."""
    expected = run(unet)
    offload(unet, "leaf_level, disk", tmp_path)

    def spoil(layer: Any, *_: object) -> None:
        layer.bias.data.fill_(torch.nan)

    layers: list[Any] = [layer.base_layer for layer in unet.modules() if isinstance(layer, EtherLayer)]
    for layer in layers:
        if layer.bias is not None:
            spoil(layer)
            layer.register_forward_hook(spoil)
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_attaching_to_an_offloaded_layer_is_refused_with_the_remedy(tmp_path, way):
    unet = fast_compiling_unet()
    saved = save_adapter(adapted("ether_plus"), tmp_path / "adapter", base_model="tiny")
    expected = run(unet)
    offload(unet, way, tmp_path / "offloaded")
    config = EtherConfig(target_modules=ATTENTION)
    remedy = r"is offloaded.*Attach first, then offload\."
    for attach_it in (lambda: unet.add_adapter(config), lambda: get_peft_model(unet, config)):  # pyright: ignore
        with pytest.raises(ValueError, match=remedy):
            attach_it()
    with pytest.raises(UserError, match=remedy):
        attach(unet, EtherPlusSettings())
    with pytest.raises(UserError, match=remedy):
        load_adapter(unet, saved)
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)


ADAPTERS = [name for name, settings in METHODS.items() if settings.peft_type]


def adapted(method: str) -> UNet2DConditionModel:
    unet = fast_compiling_unet()
    attach(unet, METHODS[method]())
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return unet


@pytest.mark.parametrize(
    ("method", "way"),
    [
        *((method, "accelerate, memory") for method in ADAPTERS),
        *(("ether_plus", way) for way in (WAYS[1], *WAYS[2::2])),
    ],
)
def test_an_adapter_in_an_offloaded_unet_is_saved_as_it_is(tmp_path, method, way):
    unet = adapted(method)
    expected = adapter_state(unet)
    for used in (
        (False, True) if METHODS[method].sequential_offload else (False,)
    ):  # before the first call and after one
        if used:
            run(unet)
        else:
            offload(unet, way, tmp_path / "offloaded")
        saved = read_adapter(save_adapter(unet, tmp_path / "adapter", base_model="tiny")).tensors
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], value) for key, value in expected.items())


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_an_adapter_that_diffusers_keeps_on_disk_is_not_saved(unet, tmp_path, level):
    offload(unet, f"{level}, disk", tmp_path / "offloaded")
    run(unet)
    with pytest.raises(UserError, match=r"offloaded to the disk by diffusers.*Save before offloading"):
        save_adapter(unet, tmp_path / "adapter", base_model="tiny")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("way", ["accelerate, memory", "leaf_level, disk"])
def test_merging_into_offloaded_weights_is_refused_with_the_remedy(unet, tmp_path, way):
    offload(unet, way, tmp_path)
    with pytest.raises(ValueError, match=r"Cannot merge into an offloaded .* Merge, then offload\."):
        unet.fuse_lora()


@pytest.mark.parametrize("slices", ["auto", 1, "max"])
def test_attention_slicing_changes_no_output(unet, slices):
    expected = run(unet)
    unet.set_attention_slice(slices)
    assert any(isinstance(processor, SlicedAttnProcessor) for processor in unet.attn_processors.values())
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)


def test_attention_without_torchs_fused_kernel_changes_no_output(unet):
    expected = run(unet)
    unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_change_no_output(unet, backend):
    """Stable Diffusion's attention calls torch itself and takes no backend; Flux's uses diffusers' dispatcher."""
    expected = run(unet)
    unet.set_attention_backend(backend)
    assert torch.equal(run(unet), expected)

    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    flux.add_adapter(EtherConfig(variant="ether_plus", init_weights=False, target_modules=["to_q", "to_out.0"]))
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        expected = flux(**inputs).sample
        flux.set_attention_backend(backend)
        processors: Any = flux.attn_processors.values()
        assert {str(processor._attention_backend.value) for processor in processors} == {backend}
        torch.testing.assert_close(flux(**inputs).sample, expected, rtol=0, atol=1e-5)

"""ControlNet by diffusers: its size, its start at the base, its files, and images equal to diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import Base, load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.controlnet import (
    ControlledUNet,
    ControlNetPipeline,
    build_controlnet,
    load_controlnet,
)
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.models.module_files import CONFIG, WEIGHTS
from ether_diffusion.models.saved_modules import CONTROLNET, find_whole_module, save_whole_module

PROMPTS = ["a red house", "a dog on grass"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


@pytest.fixture(scope="module")
def controlnet(base: Base) -> ControlNetModel:
    """As if it were trained: what it adds is not zero."""
    controlnet, generator = build_controlnet(base.unet, base.vae_factor), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
            assert parameter.any(), name
    return controlnet.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pipeline(base: Base, controlnet: ControlNetModel) -> ControlNetPipeline:
    pipeline = base.pipeline(ControlNetPipeline, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def hints() -> Tensor:
    """Red and green, each with a black half; wider than high."""
    colours = torch.eye(3)[:2, :, None, None].repeat(1, 1, 32, 64)
    colours[:, :, :, 32:] = 0
    return colours


def sample(pipeline: Any, prompt: Any, image: Any = None, *, seeds: tuple[int, ...] = (0,), **settings: Any) -> Tensor:
    """Final latents of two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if image is None else {"image": image}
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generators, **extra, **settings}
    return pipeline(prompt, **options).images


def test_for_stable_diffusion_it_has_361_million_parameters() -> None:
    with torch.device("meta"):
        controlnet = build_controlnet(build_unet(), 8)
    assert sum(parameter.numel() for parameter in controlnet.parameters()) == 361_279_120


def test_it_starts_as_the_base_and_depends_only_on_the_seed(base: Base) -> None:
    before = torch.get_rng_state()
    one, same, other = (build_controlnet(base.unet, base.vae_factor, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key])
    # As in a condition encoder, the hint block's first convolution starts at random.
    key = "controlnet_cond_embedding.conv_in.weight"
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    assert encoder.embedding.conv_in.weight.shape == one.state_dict()[key].shape
    latents, text = torch.randn(2, 8, 16, 16), torch.randn(2, 77, base.unet.config["cross_attention_dim"])
    timesteps = torch.tensor([1, 900])
    with torch.no_grad():
        alone = base.unet(latents, timesteps, text).sample
        assert torch.equal(ControlledUNet(base.unet, one)(latents, timesteps, text, torch.rand(2, 3, 64, 64)), alone)


def test_diffusers_own_pipeline_generates_the_same_images_from_the_saved_folder(
    base: Base, controlnet: ControlNetModel, pipeline: ControlNetPipeline, hints: Tensor, tmp_path: Path
) -> None:
    """Bit for bit: with guidance, for a part of the steps, at a strength other than 1, not square."""
    folder = save_whole_module(controlnet, tmp_path / "run/controlnet", CONTROLNET, base_model="tiny")
    found = find_whole_module(tmp_path / "run", CONTROLNET)
    assert found is not None
    assert (found.folder, found.method, found.base_model) == (folder, "ControlNet", "tiny")
    assert found.parameters == sum(parameter.numel() for parameter in controlnet.parameters())
    parts = {**base.pipeline().components, "controlnet": ControlNetModel.from_pretrained(folder)}
    theirs = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    loaded = base.pipeline(ControlNetPipeline, controlnet=load_controlnet(folder, base.unet, base.vae_factor))
    loaded.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 5.0, "control_guidance_end": 0.5, "seeds": (0, 1)}
    expected = sample(theirs, PROMPTS, hints, controlnet_conditioning_scale=0.7, **options)
    assert expected.shape == (2, 8, 8, 16)
    for own in (pipeline, loaded):
        assert torch.equal(sample(own, PROMPTS, hints, condition_scale=0.7, **options), expected)
    assert not torch.allclose(sample(pipeline, PROMPTS, hints, seeds=(0, 1)), expected, atol=1e-3)


def test_at_strength_zero_it_is_stable_diffusion(base: Base, pipeline: ControlNetPipeline, hints: Tensor) -> None:
    plain = base.pipeline()
    plain.set_progress_bar_config(disable=True)
    expected = sample(plain, PROMPTS[0], guidance_scale=9.0, height=32, width=64)
    assert torch.equal(sample(pipeline, PROMPTS[0], hints[:1], condition_scale=0), expected)
    assert not torch.allclose(sample(pipeline, PROMPTS[0], hints[:1]), expected, atol=1e-3)


def test_both_branches_of_guidance_get_the_hint(pipeline: ControlNetPipeline, hints: Tensor) -> None:
    seen = []
    handle = pipeline.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["controlnet_cond"]), with_kwargs=True
    )
    try:
        sample(pipeline, PROMPTS, hints, seeds=(0, 1))
    finally:
        handle.remove()
    assert all(torch.equal(batch, torch.cat([hints, hints])) for batch in seen)
    assert len(seen) == 2


def test_what_does_not_fit_is_refused_in_one_line(
    base: Base, controlnet: ControlNetModel, pipeline: ControlNetPipeline, hints: Tensor, tmp_path: Path
) -> None:
    folder = save_whole_module(controlnet, tmp_path / "controlnet", CONTROLNET, base_model="tiny")
    with torch.device("meta"):
        large: Any = UNet2DConditionModel.from_config(build_unet().config)
    with pytest.raises(UserError, match=rf"{CONFIG}: the ControlNet does not fit the base: in_channels 8, not 4; .*"):
        load_controlnet(folder, large, 8)
    with pytest.raises(UserError, match="pixels per latent 4, not 8"):
        load_controlnet(folder, base.unet, 8)
    config = (folder / CONFIG).read_text()
    for broken in ("{", '{"_class_name": "ControlNetModel", "block_out_channels": 3}'):
        (folder / CONFIG).write_text(broken)
        with pytest.raises(UserError, match=rf"{CONFIG}: not the config of a ControlNet: ") as caught:
            load_controlnet(folder, base.unet, base.vae_factor)
        assert "\n" not in str(caught.value)
    (folder / CONFIG).write_text(config)
    state = load_file(folder / WEIGHTS)
    del state["conv_in.bias"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"does not fit this ControlNet of \d+ tensors: 1 missing, e.g. conv_in.bias"):
        load_controlnet(folder, base.unet, base.vae_factor)
    for wrong, message in ((hints[:, :2], "expected"), (hints * 2, "from 0 to 1"), ([], "no hint")):
        with pytest.raises(UserError, match=message):
            sample(pipeline, PROMPTS, wrong, height=32, width=64)
    with pytest.raises(UserError, match="0 <= start < end <= 1"):
        sample(pipeline, PROMPTS, hints, control_guidance_start=1.0)

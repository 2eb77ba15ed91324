"""Laws of the controllable pipeline: the hint reaches both branches, its own image, the steps it is meant for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ether_diffusion.models.bases import Base, load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.conditioning import added_features
from ether_diffusion.models.controllable_pipeline import ControllablePipeline, controllable_pipeline

PROMPTS = ["a red house", "a dog on grass", "a blue tree"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


@pytest.fixture
def pipeline(base: Base) -> ControllablePipeline:
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    pipeline = controllable_pipeline(base, encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def hints() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def draw(pipeline: Any, prompt: Any, image: Any = None, *, seeds: tuple[int, ...] = (0,), **settings: Any) -> Tensor:
    """Final latents of two steps, unless told otherwise."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if image is None else {"image": image}
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generators, **extra, **settings}
    return pipeline(prompt, **options).images


def test_without_its_hint_it_is_stable_diffusion(base: Base, pipeline: Any, hints: Tensor) -> None:
    plain = base.pipeline()
    plain.set_progress_bar_config(disable=True)
    expected = draw(plain, PROMPTS[0], guidance_scale=9.0)
    assert torch.equal(draw(pipeline, PROMPTS[0], hints[0], condition_scale=0.0), expected)
    assert not torch.allclose(draw(pipeline, PROMPTS[0], hints[0]), expected, atol=1e-2)
    assert torch.equal(draw(plain, PROMPTS[0], guidance_scale=9.0), expected)  # nothing stays behind in the shared UNet


def test_both_branches_of_guidance_keep_the_hint(base: Base, pipeline: Any, hints: Tensor) -> None:
    """By the formula of guidance, with the UNet called once for each branch and the hint in both."""
    features = pipeline.condition_encoder(hints[:1])
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    text, empty = (pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in (PROMPTS[0], ""))
    pipeline.scheduler.set_timesteps(1)
    time = pipeline.scheduler.timesteps[0]
    with torch.no_grad(), added_features(base.unet, features):
        conditional, unconditional = (base.unet(latents, time, hidden).sample for hidden in (text, empty))
    guided = unconditional + 9.0 * (conditional - unconditional)
    expected = pipeline.scheduler.step(guided, time, latents).prev_sample
    drawn = draw(pipeline, PROMPTS[0], hints[0], latents=latents, num_inference_steps=1)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_each_image_follows_its_own_hint(pipeline: Any, hints: Tensor) -> None:
    together = draw(pipeline, PROMPTS, hints, seeds=(0, 1, 2))
    for k, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(draw(pipeline, prompt, hints[k], seeds=(k,))[0], together[k], rtol=1e-4, atol=1e-4)
    order = [2, 0, 1]
    shuffled = draw(pipeline, [PROMPTS[k] for k in order], hints[order], seeds=(2, 0, 1))
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-4)

"""The controllable pipeline: the hint reaches both branches of guidance, its own image, and the chosen steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import Base, load_base
from ether_diffusion.models.condition_encoder import ConditionEncoder, build_condition_encoder
from ether_diffusion.models.conditioning import added_features
from ether_diffusion.models.controllable_pipeline import ControllablePipeline

PROMPTS = ["a red house", "a dog on grass", "a blue tree"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


@pytest.fixture
def pipeline(base: Base) -> ControllablePipeline:
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(2))
    pipeline = base.pipeline(ControllablePipeline, condition_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def hints() -> Tensor:
    """Red, green and blue, each with a black half: as different as hints can be."""
    colours = torch.eye(3)[:, :, None, None].repeat(1, 1, 64, 64)
    colours[:, :, :, 32:] = 0
    return colours


def sample(pipeline: Any, prompt: Any, image: Any = None, *, seeds: tuple[int, ...] = (0,), **settings: Any) -> Tensor:
    """Final latents, by default after two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if image is None else {"image": image}
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generators, **extra, **settings}
    return pipeline(prompt, **options).images


def test_without_its_hint_it_is_stable_diffusion(base: Base, pipeline: Any, hints: Tensor) -> None:
    plain = base.pipeline()
    plain.set_progress_bar_config(disable=True)
    expected = sample(plain, PROMPTS[0], guidance_scale=9.0)
    assert torch.equal(sample(pipeline, PROMPTS[0], hints[0], condition_scale=0.0), expected)
    assert not torch.allclose(sample(pipeline, PROMPTS[0], hints[0]), expected, atol=1e-2)
    assert torch.equal(sample(plain, PROMPTS[0], guidance_scale=9.0), expected)  # the shared UNet is unchanged


def test_both_branches_of_guidance_get_the_hint(base: Base, pipeline: Any, hints: Tensor) -> None:
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
    found = sample(pipeline, PROMPTS[0], hints[0], latents=latents, num_inference_steps=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_each_image_follows_its_own_hint(pipeline: Any, hints: Tensor) -> None:
    together = sample(pipeline, PROMPTS, hints, seeds=(0, 1, 2))
    for k, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(sample(pipeline, prompt, hints[k], seeds=(k,))[0], together[k], rtol=1e-3, atol=1e-3)
    order = [2, 0, 1]
    shuffled = sample(pipeline, [PROMPTS[k] for k in order], hints[order], seeds=(2, 0, 1))
    torch.testing.assert_close(shuffled, together[order], rtol=1e-3, atol=1e-3)


def test_several_images_of_each_prompt(pipeline: Any, hints: Tensor) -> None:
    """In diffusers' order: the images of the first prompt first."""
    found = sample(pipeline, PROMPTS[:2], hints[:2], seeds=(0, 1, 2, 3), num_images_per_prompt=2)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    spelled_out = sample(pipeline, prompts, hints[[0, 0, 1, 1]], seeds=(0, 1, 2, 3))
    torch.testing.assert_close(found, spelled_out, rtol=1e-3, atol=1e-3)
    shared = sample(pipeline, PROMPTS[:2], hints[0], seeds=(0, 1, 2, 3), num_images_per_prompt=2)
    torch.testing.assert_close(
        shared, sample(pipeline, prompts, hints[[0] * 4], seeds=(0, 1, 2, 3)), rtol=1e-3, atol=1e-3
    )


def test_features_are_computed_once_per_call(pipeline: Any, hints: Tensor) -> None:
    calls: list[int] = []
    handle = pipeline.condition_encoder.register_forward_hook(lambda *_: calls.append(1))
    sample(pipeline, PROMPTS[0], hints[0], num_inference_steps=3)
    handle.remove()
    assert len(calls) == 1


# When the hint is given


def given_at(pipeline: Any, hint: Tensor, **settings: Any) -> list[bool]:
    """Whether the hint was given, by step."""
    seen: list[Tensor] = []
    first: Any = pipeline.unet.conv_in
    handles = [
        first.register_forward_hook(lambda module, args, output: seen.append(output)),
        pipeline.unet.down_blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    sample(pipeline, PROMPTS[0], hint, **settings)
    for handle in handles:
        handle.remove()
    return [not torch.equal(before, after) for before, after in zip(seen[::2], seen[1::2], strict=True)]


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 1.0, range(10)), (0.2, 0.7, range(2, 7)), (0.0, 0.5, range(5)), (0.55, 1.0, range(6, 10))],
)
def test_the_hint_is_given_between_start_and_end(
    pipeline: Any, hints: Tensor, start: float, end: float, steps: range
) -> None:
    window: dict[str, Any] = {"control_guidance_start": start, "control_guidance_end": end}
    assert given_at(pipeline, hints[0], num_inference_steps=10, **window) == [k in steps for k in range(10)]


@pytest.mark.parametrize(("scheduler", "calls"), [(HeunDiscreteScheduler, 7), (PNDMScheduler, 5)])
def test_schedulers_that_call_the_unet_more_than_once_a_step(
    base: Base, pipeline: Any, hints: Tensor, scheduler: Any, calls: int
) -> None:
    """Fractions are of the calls, as in diffusers' ControlNet pipelines."""
    settings = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipeline.scheduler = scheduler.from_config(base.scheduler_config, **settings)
    given = given_at(pipeline, hints[0], num_inference_steps=4, control_guidance_end=0.5)
    assert given == [(k + 1) / calls <= 0.5 for k in range(calls)]


def test_callbacks_of_the_caller_are_called(pipeline: Any, hints: Tensor) -> None:
    steps: list[int] = []

    def erase(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": tensors["latents"] * 0}

    window: dict[str, Any] = {"control_guidance_end": 0.5}
    assert not sample(pipeline, PROMPTS[0], hints[0], callback_on_step_end=erase, num_inference_steps=3, **window).any()
    assert steps == [0, 1, 2]
    # diffusers' own callbacks name the tensors that they need; this one ends guidance after the first step
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)  # pyright: ignore[reportArgumentType]
    cut = sample(pipeline, PROMPTS[0], hints[0], callback_on_step_end=cutoff, **window)
    assert not torch.allclose(cut, sample(pipeline, PROMPTS[0], hints[0], **window), atol=1e-3)


# Valid and invalid hints


def test_images_are_as_large_as_the_hint_and_need_not_be_square(pipeline: Any) -> None:
    wide = Image.new("RGB", (85, 50), "red")
    assert sample(pipeline, PROMPTS[0], wide).shape[-2:] == (12, 20)  # 48 x 80: multiples of 16
    assert sample(pipeline, PROMPTS[0], wide, height=32, width=64).shape[-2:] == (8, 16)
    image = sample(pipeline, PROMPTS[0], torch.rand(3, 48, 80), output_type="pil")[0]
    assert image.size == (80, 48)


def test_an_image_and_its_tensor_are_the_same_hint(pipeline: Any) -> None:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image_hint = Image.fromarray(pixels.numpy())
    tensor = pixels.permute(2, 0, 1) / 255
    found = sample(pipeline, PROMPTS[0], image_hint)
    for same in (tensor, tensor[None], [tensor], [image_hint]):
        assert torch.equal(sample(pipeline, PROMPTS[0], same), found)


def test_a_painted_map_keeps_its_colours_when_it_is_resized(pipeline: Any) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [6, 230, 230]], dtype=torch.uint8)
    labels = torch.randint(0, 3, (90, 70), generator=torch.Generator().manual_seed(0))
    taken: list[Tensor] = []
    handle = pipeline.condition_encoder.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    sample(pipeline, PROMPTS[0], Image.fromarray(colours[labels].numpy()), height=64, width=64)
    handle.remove()
    found = (taken[0][0] * 255).round().to(torch.uint8).flatten(1).T.unique(dim=0)
    assert found.tolist() == sorted(colours.tolist())


@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (None, {}, "image: NoneType; expected an RGB image or a tensor"),
        ([], {}, "image: no hint"),
        (torch.rand(2, 3, 64, 64), {}, "2 hints for 1 prompts"),
        (torch.rand(64, 64), {}, r"a tensor \(64, 64\); expected"),
        (torch.rand(3, 64, 64), {"height": 32}, r"a tensor \(3, 64, 64\); expected \(3, 32, 64\)"),
        (torch.rand(3, 64, 64) * 255, {}, "a hint's are from 0 to 1"),
        (torch.full((3, 64, 64), torch.nan), {}, "values from nan to nan"),
        (Image.new("L", (64, 64)), {}, "mode L; a hint is RGB. A label map has to be painted first"),
        (torch.rand(3, 64, 64), {"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "0 <= start < end <= 1"),
    ],
)
def test_invalid_hints_are_one_line(pipeline: Any, image: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sample(pipeline, PROMPTS[0], image, **settings)
    assert "\n" not in str(caught.value)


def test_an_encoder_of_another_base_is_refused(base: Base) -> None:
    for encoder in (ConditionEncoder(320, (16, 32, 96)), build_condition_encoder(base.unet, 8)):
        with pytest.raises(UserError, match="this base takes 64 and 4"):
            base.pipeline(ControllablePipeline, condition_encoder=encoder)


# Saved, offloaded


def test_saved_and_loaded_it_generates_the_same(pipeline: Any, hints: Tensor, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ControllablePipeline.from_pretrained(tmp_path, requires_safety_checker=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, PROMPTS[0], hints[0]), sample(pipeline, PROMPTS[0], hints[0]))


def offload_layers(pipeline: Any) -> None:
    # As `enable_sequential_cpu_offload` does, which fails with "cpu:0".
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.condition_encoder):
        accelerate.cpu_offload(part, torch.device("cpu"))


@pytest.mark.parametrize(
    "save_memory",
    [
        lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
        offload_layers,
        lambda pipeline: pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    ],
    ids=["model offload", "sequential offload", "group offload"],
)
def test_an_offloaded_pipeline_generates_the_same(hints: Tensor, save_memory: Callable[[Any], None]) -> None:
    base = load_base("tiny")
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    torch.nn.init.normal_(encoder.embedding.conv_out.weight, 0, 0.3)
    pipeline = base.pipeline(ControllablePipeline, condition_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    expected = sample(pipeline, PROMPTS[0], hints[0])
    save_memory(pipeline)
    assert torch.equal(sample(pipeline, PROMPTS[0], hints[0]), expected)

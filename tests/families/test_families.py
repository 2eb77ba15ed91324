"""What each family says of its models, against diffusers' own pipelines: random weights, cut sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from ether_diffusion.adapters.attach import attach, set_scale
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, sample_images
from ether_diffusion.models.bases import Base, check_takes_hints, fingerprint
from ether_diffusion.models.families.family import Diffusion
from ether_diffusion.models.families.flux_1 import packed, places, unpacked
from ether_diffusion.models.families.table import FAMILIES, family_of
from ether_diffusion.randomness import generator
from support.adapted_unets import move
from support.pipelines import BUILDERS, SIDE, denoiser, pipeline

FAMILY = {name: name.split()[0] for name in BUILDERS}
PROMPTS = ["a photo of qwe dog", "a much longer photo of a dog, in the jungle"]
MakeBase = Callable[[str], Base]


def encoded_by(name: str, made: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The features that a pipeline's own `encode_prompt` returns, by our names."""
    if name in ("sd1", "sd2"):
        return {"encoder_hidden_states": made.encode_prompt(prompts, "cpu", 1, False)[0]}
    if name == "sdxl":
        features, _, pooled, _ = made.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        return {"encoder_hidden_states": features, "text_embeds": pooled}
    if name.startswith("sd3"):
        features, _, pooled, _ = made.encode_prompt(
            prompts, None, None, device="cpu", do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": features, "pooled_projections": pooled}
    if name.startswith("flux"):
        features, pooled, _ = made.encode_prompt(prompts, None, device="cpu")
        return {"encoder_hidden_states": features, "pooled_projections": pooled}
    found, _ = made.encode_prompt([*prompts], device="cpu", do_classifier_free_guidance=False)
    return {f"prompt {k}": features for k, features in enumerate(found)}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_folder_is_recognised_and_loaded_whole(name: str, base_of: MakeBase) -> None:
    base, plain = base_of(name), pipeline(name)
    assert base.family.name == FAMILY[name]
    assert family_of(plain) is base.family
    assert set(base.modules) == {key for key, part in plain.components.items() if isinstance(part, torch.nn.Module)}
    for part, module in base.modules.items():
        assert fingerprint(module) == fingerprint(plain.components[part])
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert type(base.pipeline()) is type(plain)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_conditioning_is_what_the_pipeline_itself_computes(name: str) -> None:
    plain = pipeline(name)
    family = family_of(plain)
    found = family.encode(plain.components, family.tokens(plain.components, PROMPTS))
    assert tuple(found) == family.conditioning
    if name == "z-image":
        lists = zip(found["encoder_hidden_states"], found["encoder_attention_mask"], strict=True)
        found = {f"prompt {k}": features[mask] for k, (features, mask) in enumerate(lists)}
    expected = encoded_by(name, plain, PROMPTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes(name: str) -> None:
    """A pipeline divides by the scale and adds the shift before its VAE decodes."""
    plain = pipeline(name)
    config = plain.vae.config
    mean, deviation = family_of(plain).moments(plain.vae, torch.rand(1, 3, SIDE, SIDE) * 2 - 1)
    assert mean.shape == deviation.shape == (1, config["latent_channels"], SIDE // 2, SIDE // 2)
    latents = family_of(plain).latents(plain.vae, mean)
    torch.testing.assert_close(latents / config["scaling_factor"] + (config["shift_factor"] or 0), mean)


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_the_denoiser_sees_what_its_pipeline_shows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of the denoiser in a pipeline, made again by the family from its inputs, returns the same."""
    plain = pipeline(name)
    family, model = family_of(plain), denoiser(plain)
    calls: list[tuple[Any, Any, Any]] = []
    forward = type(model).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        calls.append((args, kwargs, output))
        return output

    latents = torch.randn(1, family_channels(plain), SIDE // 2, SIDE // 2)
    given = packed(latents) if name.startswith("flux") else latents
    options = {"guidance_scale": 1.0} if name.startswith("flux") else {"guidance_scale": 0.0}
    monkeypatch.setattr(type(model), "forward", spy)
    made = plain(
        PROMPTS[0], height=SIDE, width=SIDE, num_inference_steps=2, latents=given, output_type="latent", **options
    )
    assert made.images.shape == given.shape
    args, kwargs, output = calls[0]
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    seen = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if name == "z-image":
        noisy, t, theirs = seen[0].squeeze(1)[None], 1000 * (1 - timestep), -output[0][0].squeeze(1)[None]
    elif name.startswith("flux"):
        noisy = unpacked(seen, SIDE // 2, SIDE // 2)
        t, theirs = 1000 * timestep, unpacked(output[0], SIDE // 2, SIDE // 2)
    else:
        noisy, t, theirs = seen, timestep.reshape(-1), output[0]
    conditioning = family.encode(plain.components, family.tokens(plain.components, PROMPTS[:1]))
    conditioning |= family.of_frames([(SIDE, SIDE, 0, 0, SIDE, SIDE)])
    ours = family.denoise(model, noisy, t, conditioning)
    assert ours.shape == latents.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def family_channels(made: Any) -> int:
    return made.vae.config["latent_channels"]


@pytest.mark.parametrize("name", BUILDERS)
def test_images_at_scale_0_are_those_of_the_plain_pipeline(name: str, base_of: MakeBase) -> None:
    base = base_of(name)
    sampling = Sampling(**{"scheduler": "euler", "guidance": 3.0, **base.family.sampling, "steps": 2})
    jobs = jobs_for(["a qwe dog"], 1)
    plain = base.pipeline()
    if isinstance(base.family.objective, Diffusion):
        kind = {"dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}[sampling.scheduler]
        plain.scheduler = kind.from_config(base.scheduler_config)
    expected = plain(
        "a qwe dog",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=sampling.guidance,
        generator=generator(5, "image/a qwe dog", 0),
    ).images[0]

    made = base.pipeline()
    attach(base.denoiser, EtherPlusSettings())
    move(base.denoiser)

    def image(scale: float) -> Any:
        set_scale(base.denoiser, scale)
        [(_, found)] = sample_images(made, jobs, sampling, seed=5, resolution=SIDE)
        return found

    assert image(0).tobytes() == expected.tobytes()
    assert image(1).tobytes() != expected.tobytes()


@pytest.mark.parametrize("name", [name for name in BUILDERS if name[:3] not in ("sd1", "sd2", "sdx")])
def test_both_schedulers_of_flow_matching_sample_and_leave_the_shift_as_it_was(name: str) -> None:
    """The base's own one after the other one, too: the configs of diffusers pass from one to the next."""
    made = pipeline(name)
    own, images = dict(made.scheduler.config), []
    for scheduler in ("euler", "dpm++", "euler"):
        sampling = Sampling(scheduler=scheduler, steps=2, guidance=2.0)  # pyright: ignore[reportArgumentType]
        [(_, image)] = sample_images(made, jobs_for(["a dog"], 1), sampling, seed=1, resolution=SIDE)
        images.append(image.tobytes())
    assert dict(made.scheduler.config) == own
    assert images[0] == images[2] != images[1]


def test_packing_is_that_of_the_pipeline() -> None:
    latents = torch.randn(2, 16, 6, 4)
    theirs = FluxPipeline._pack_latents(latents, 2, 16, 6, 4)
    assert torch.equal(packed(latents), theirs)
    assert torch.equal(unpacked(theirs, 6, 4), latents)
    assert torch.equal(places(3, 2), FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32))


def test_every_family_has_names_of_its_own() -> None:
    assert len({family.name for family in FAMILIES}) == len({family.title for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name[:3] not in ("sd1", "sd2", "sdx")])
def test_what_follows_no_conditions_says_so_in_one_line(name: str) -> None:
    plain = pipeline(name)
    base = Base.of("folder", plain)
    with pytest.raises(UserError, match=r"^base_model: folder is of the family .* controllable runs take: Stable") as e:
        check_takes_hints(base)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "scheduler"), [("sd3", "ddim"), ("flux", "pndm"), ("z-image", "unipc")])
def test_a_scheduler_of_another_objective_is_refused(name: str, scheduler: str) -> None:
    made = pipeline(name)
    with pytest.raises(UserError, match=rf"scheduler = {scheduler.replace('+', '.')}; a base of .* takes euler"):
        list(sample_images(made, jobs_for(["a"], 1), Sampling(scheduler=scheduler), seed=0))  # pyright: ignore

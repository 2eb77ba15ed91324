"""One batch of a DreamBooth run of each family: noised as its formulas say, and a gradient for every adapted layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth
from ether_diffusion.training.schedule import make_plan
from ether_diffusion.training.training_base import attach_adapter
from support.pipelines import BUILDERS, SIDE

FLOWS = [name for name in BUILDERS if not name.startswith(("sd1", "sd2", "sdxl"))]
TEXT = ["sd1", "sd2", "sdxl", "sd3", "flux"]
"""Families whose text encoders can take adapters."""
MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


def make_task(make_config: MakeConfig, folder: Path, base_folder: Path, *overrides: str) -> Any:
    """A task with an adapter in its base; the photos stand for class images."""
    given = (f"base_model={base_folder}", f"data.resolution={SIDE}", "data.prior.sampling.scheduler=euler", *overrides)
    config = dreambooth.resolve(make_config(folder, *given))
    base, accelerator = load_base(config.base_model), Accelerator()
    task = dreambooth.DreamBoothTask(config, None, resumed=False)
    task.use_base(base, accelerator, dry_run=True)
    attach_adapter(config, base, None)
    task.build(base, make_plan(config.training, task.samples_per_epoch), accelerator)
    return task


def trained(task: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in task.module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", [*BUILDERS, *(f"{name}, text" for name in TEXT)])
def test_every_adapted_layer_gets_a_gradient(
    name: str, make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    family, _, text = name.partition(", ")
    overrides = ["adapter.text_encoder=true"] if text else []
    task = make_task(make_config, tmp_path, folder_of(family), *overrides)
    batch = task.prepare(task.collate([task.dataset[3], task.dataset[7]]))
    with torch.no_grad():  # ETHER+ starts where u and v cancel
        for parameter in trained(task).values():
            parameter += 0.01 * torch.randn_like(parameter)
    losses = task.module(batch)
    assert set(losses) == {"loss", "instance_loss", "prior_loss"}
    losses["loss"].backward()
    without = [key for key, parameter in trained(task).items() if parameter.grad is None or not parameter.grad.any()]
    assert without == []
    parts = {key.split(".")[0] for key in trained(task)}
    encoders = task.base.trainable_text_encoders if text else {}
    assert parts == {task.base.family.denoiser, *encoders}


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_flow_matching_is_the_straight_path(
    name: str, make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """x = (1 - σ) x₀ + σ ε with t = 1000 σ, and the target ε - x₀; latents are the VAE's, shifted and scaled."""
    task = make_task(make_config, tmp_path, folder_of(name), "data.prior=null")
    samples = [task.dataset[k] for k in (3, 7)]
    batch = task.prepare(task.collate(samples))
    config = task.base.vae.config
    errors = []
    for k, sample in enumerate(samples):
        sigma = batch["timesteps"][k] / 1000
        x, target = batch["noisy_latents"][k], batch["target"][k]
        assert 0 < sigma <= 1
        latents = x - sigma * target
        mean = task.base.vae.encode(sample["pixel_values"][None]).latent_dist.mean[0]
        deviation = task.base.vae.encode(sample["pixel_values"][None]).latent_dist.std[0]
        z = (latents / config.scaling_factor + config.shift_factor - mean) / deviation
        assert z.abs().max() < 5
        assert abs(float(z.std()) - 1) < 0.2
        one = {key: batch[key][k : k + 1] for key in task.base.family.conditioning}
        predicted = task.base.family.denoise(task.base.denoiser, x[None], batch["timesteps"][k : k + 1], one)
        errors.append(F.mse_loss(predicted[0], target))
    assert float(task.module(batch)["loss"]) == pytest.approx(float(sum(errors)) / 2, rel=1e-4)


@torch.no_grad()
def test_the_loss_of_sd3_is_that_of_diffusers_example_without_its_preconditioning(
    make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """That example compares x - σ f with x₀, whose error is σ times the velocity's."""
    task = make_task(make_config, tmp_path, folder_of("sd3"), "data.prior=null")
    batch = task.prepare(task.collate([task.dataset[3]]))
    sigma, x = batch["timesteps"] / 1000, batch["noisy_latents"]
    predicted = task.base.family.denoise(task.base.denoiser, x, batch["timesteps"], batch)
    latents = x - sigma * batch["target"]
    theirs = ((predicted * -sigma + x) - latents).square().mean()
    assert float(theirs / sigma**2) == pytest.approx(float(task.module(batch)["loss"]), rel=1e-4)


def test_timesteps_have_the_density_and_the_shift_of_the_family(
    make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """u → t by the scheduler's own list: with a static shift of 3, u = 0.3 gives σ = 3 · 0.7 / (1 + 2 · 0.7)."""
    streams = [("instance", k) for k in range(4000)]
    found = {}
    for name in ("sd3", "flux", "z-image"):
        task = make_task(make_config, tmp_path, folder_of(name), "data.prior=null")
        found[name] = task.objective.timesteps(0, streams) / 1000
        assert task.objective.levels[300] == pytest.approx(700 if name == "flux" else 875, abs=1)
    assert float(found["flux"].mean()) == pytest.approx(0.5, abs=0.02)  # uniform, unshifted
    unshifted = {name: sigma / (3 - 2 * sigma) for name, sigma in found.items() if name != "flux"}
    assert float(unshifted["z-image"].std()) == pytest.approx(12**-0.5, abs=0.01)  # uniform
    logits = torch.logit(unshifted["sd3"].clamp(1e-3, 1 - 1e-3))
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((0, 1), abs=0.06)  # logit-normal (0, 1)


def test_sizes_and_crops_condition_stable_diffusion_xl(
    make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """(height, width) of the photo, (top, left) of the crop in the scaled photo, and the crop's (height, width)."""
    task = make_task(make_config, tmp_path, folder_of("sdxl"), "data.horizontal_flip=true")
    samples = [task.dataset[k] for k in range(4)]
    ids = task.prepare(task.collate(samples))["time_ids"]
    assert ids.shape == (8, 6)
    for row, sample in zip(ids[:4].tolist(), samples, strict=True):
        key = task.dataset.key(sample["index"])
        left = key.scaled_width - key.left - key.width if key.flipped else key.left
        photo = next(photo for photo in task.subjects[0].photos.photos if photo.name == key.photo)
        assert row == [photo.size[1], photo.size[0], key.top, left, SIDE, SIDE]


def test_min_snr_is_refused_for_flow_matching(
    make_config: MakeConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    task = make_task(make_config, tmp_path, folder_of("sd3"), "training.min_snr_gamma=5")
    with pytest.raises(Exception, match=r"^training\.min_snr_gamma: 5, but this base is trained by flow matching"):
        task.prepare(task.collate([task.dataset[0]]))

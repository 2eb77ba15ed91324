"""The shipped controllable configs: the paper's settings, and its parameter counts on Stable Diffusion v1.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ether_diffusion.adapters.attach import attach, count_parameters
from ether_diffusion.config import load_config
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.training.controllable import ControllableConfig, resolve

NAMES = ["ether", "ether_plus", "ether_plus_both", "lora", "oft", "naive", "encoder_only"]


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "rate"),
    [
        ("ether", 144, 111_936, 1e-3),
        ("ether_plus", 144, 423_552, 1e-3),
        ("ether_plus_both", 144, 623_232, 1e-3),
        ("lora", 144, 1_246_464, 1e-4),
        ("oft", 144, 13_144_928, 1e-5),
        ("naive", 144, 26_401_792, 1e-5),
        ("encoder_only", 0, 0, 1e-4),
    ],
)
def test_parameters_and_rates_are_the_papers(name: str, layers: int, parameters: int, rate: float) -> None:
    config = load_config(ControllableConfig, f"controllable/{name}")
    with torch.device("meta"):
        unet = build_unet().requires_grad_(False)
        encoder = build_condition_encoder(unet, vae_factor=8)
    matched = [] if config.adapter.method == "none" else attach(unet, config.adapter)
    assert (len(matched), count_parameters(unet)) == (layers, parameters)
    assert count_parameters(encoder) == 1_086_480
    training = resolve(config).training
    assert (training.learning_rate, training.encoder_learning_rate) == (rate, min(rate, 1e-4))


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_have_the_papers_settings(name: str) -> None:
    config = load_config(ControllableConfig, f"controllable/{name}")
    training, data, sampling = config.training, config.data, config.validation.sampling
    assert (training.epochs, training.steps, training.batch_size) == (20, None, 10)
    assert (training.optimizer, training.betas, training.weight_decay) == ("adamw", (0.9, 0.999), 1e-2)
    assert (training.schedule, training.warmup_steps, training.max_grad_norm) == ("constant", 0, None)
    assert (data.resolution, data.crop, data.horizontal_flip, data.caption_dropout) == (512, "center", False, 0)
    assert (sampling.scheduler, sampling.steps, sampling.guidance) == ("ddim", 50, 9.0)


@pytest.mark.parametrize("name", NAMES)
def test_configs_differ_only_in_what_they_are_named_for(name: str) -> None:
    own, other = (load_config(ControllableConfig, f"controllable/{n}") for n in (name, "ether_plus"))
    assert own.output_dir == Path("runs") / f"controllable_{name}"
    same = {"adapter": other.adapter, "output_dir": other.output_dir}
    assert own.model_copy(update=same) == other

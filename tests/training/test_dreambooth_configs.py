"""The shipped DreamBooth configs: the paper's settings, and its parameter counts on Stable Diffusion v1.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ether_diffusion.adapters.attach import attach, count_parameters
from ether_diffusion.config import load_config
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.training.dreambooth import DreamBoothConfig, resolve

NAMES = ["ether", "ether_plus", "lora", "oft", "naive"]


@pytest.mark.parametrize(
    ("name", "parameters", "rate"),
    [
        ("ether", 99_456, 6e-3),
        ("ether_plus", 398_592, 6e-3),
        ("lora", 797_184, 6e-4),
        ("oft", 11_602_368, 6e-5),
        ("naive", 23_304_192, 6e-5),
    ],
)
def test_parameters_and_rates_are_the_papers(name: str, parameters: int, rate: float) -> None:
    config = load_config(DreamBoothConfig, f"dreambooth/{name}")
    with torch.device("meta"):
        unet = build_unet()
    assert len(attach(unet, config.adapter)) == 128
    assert count_parameters(unet) == parameters
    assert resolve(config).training.learning_rate == rate


@pytest.mark.parametrize("name", NAMES)
def test_configs_differ_only_in_what_they_are_named_for(name: str) -> None:
    own, other = (load_config(DreamBoothConfig, f"dreambooth/{n}") for n in (name, "ether_plus"))
    training = own.training
    assert (training.steps, training.batch_size, training.checkpoint_every) == (1400, 1, 200)
    assert (training.betas, training.weight_decay, training.max_grad_norm) == ((0.9, 0.999), 1e-2, 1.0)
    assert (training.schedule, training.warmup_steps, own.data.resolution, own.data.crop) == (
        "constant",
        0,
        512,
        "random",
    )
    assert own.data.prior is not None
    assert (own.data.prior.weight, own.data.prior.num_images) == (1.0, 200)
    assert own.output_dir == Path("runs") / f"dreambooth_{name}"
    same = {"adapter": other.adapter, "output_dir": other.output_dir}
    assert own.model_copy(update=same) == other

"""The shipped configs of other families: they load, and state what they train."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from ether_diffusion.adapters.attach import attach, count_parameters
from ether_diffusion.config import load_config
from ether_diffusion.models.families.table import FAMILIES
from ether_diffusion.training.dreambooth import DreamBoothConfig, resolve

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "sd2": "Stable Diffusion v2.1",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3.5 medium",
    "flux": "FLUX.1-dev",
    "z_image": "Z-Image",
}
NAMES = [f"{family}/{method}" for family in MODELS for method in ("ether_plus", "lora")]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_samples_as_its_family_can(name: str) -> None:
    config = resolve(load_config(DreamBoothConfig, f"dreambooth/{name}"))
    family = next(family for family in FAMILIES if family.name == name.split("/")[0].replace("_", "-"))
    assert config.data.prior is not None
    for sampling in (config.data.prior.sampling, config.validation.sampling):
        assert sampling.scheduler in family.schedulers({})
        assert sampling.guidance == {"guidance": 7.5, **family.sampling}["guidance"]
    text = (ROOT / f"configs/dreambooth/{name}.yaml").read_text()
    assert "not from the paper" in next(line for line in text.splitlines() if "learning_rate" in line)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_config_states_how_many_parameters_it_trains(name: str) -> None:
    config = load_config(DreamBoothConfig, f"dreambooth/{name}")
    models = runpy.run_path(str(ROOT / "benchmarks/family_sizes.py"))["MODELS"]
    with torch.device("meta"):
        model = models[MODELS[name.split("/")[0]]]()
        layers = attach(model, config.adapter)
    text = (ROOT / f"configs/dreambooth/{name}.yaml").read_text()
    assert f"{count_parameters(model):,} trainable parameters" in text
    assert f"{len(layers)} layers" in text

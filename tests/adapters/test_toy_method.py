"""A method is one entry in one table: registered by one call, it does all that the shipped ones do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig
from torch import Tensor, nn

import ether_diffusion
from ether_diffusion.adapters.attach import attach, merge, set_scale, trainable_parameters
from ether_diffusion.adapters.method_settings import MethodSettings
from ether_diffusion.adapters.methods import METHODS, method_of, register_method
from ether_diffusion.adapters.peft_methods import LoraSettings
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.config import ConfigError, load_config, to_yaml
from ether_diffusion.generation import Sampling, generate, jobs_for, load_pipeline, read_run, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import controllable, dreambooth
from support.toy_method import GainPeftType, GainSettings, gain_method


@pytest.fixture(autouse=True)
def toy() -> Iterator[type[GainSettings]]:
    with gain_method() as settings:
        yield settings


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 8, 8, generator=generator), torch.randn(1, 7, 128, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500]), text).sample


@pytest.fixture
def run(toy: type[GainSettings], tmp_path: Path) -> Path:
    """A run folder of the method: every gain is 0.5."""
    unet = load_base("tiny").unet
    before = output(unet)
    assert len(attach(unet, toy(), seed=0)) == 56
    assert torch.equal(output(unet), before)
    for parameter in trainable_parameters(unet).values():
        parameter.data.fill_(0.5)
    ether_diffusion.save_adapter(unet, tmp_path / "run/adapter", base_model="tiny")
    (tmp_path / "run/config.yaml").write_text(yaml.dump({"base_model": "tiny", "adapter": {"method": "gain"}}))
    return tmp_path / "run"


def test_it_is_saved_read_loaded_and_merged(run: Path) -> None:
    saved = read_adapter(run)
    assert (saved.method, saved.base_model, saved.parameters) == ("Gain", "tiny", 56)
    assert read_run(run).facts is GainSettings
    card = (run / "adapter/README.md").read_text()
    assert "# Gain adapter for tiny" in card
    assert "Method: [Gain](https://example.org/gain)." in card

    adapted, dense = load_base("tiny").unet, load_base("tiny").unet
    ether_diffusion.load_adapter(adapted, run)
    for name, module in adapted.named_modules():
        if hasattr(module, "gain_values"):
            dense.get_submodule(name).weight.data.mul_(1.5)  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch.testing.assert_close(output(adapted), output(dense), rtol=0, atol=1e-5)
    merge(adapted)
    torch.testing.assert_close(output(adapted), output(dense), rtol=0, atol=1e-5)


def test_it_generates_and_has_a_scale(run: Path, tmp_path: Path) -> None:
    pipeline, saved = load_pipeline(run)
    assert saved is not None
    options: dict[str, Any] = {"sampling": Sampling(steps=2), "record": {"adapter": saved.digest}}
    (file,) = generate(pipeline, ["a toy"], tmp_path / "images", **options).files
    assert json.loads((tmp_path / "images/images.jsonl").read_text())["adapter"] == saved.digest
    assert file.is_file()

    def image(run: Path | None, **options: Any) -> np.ndarray:
        pipeline, _ = load_pipeline(run, base_model="tiny", **options)
        ((_, image),) = sample_images(pipeline, jobs_for(["a toy"], 1), Sampling(steps=2), seed=0)
        return np.asarray(image).astype(int)

    base, adapted = image(None), image(run)
    assert np.abs(adapted - base).max() > 8
    assert np.array_equal(image(run, scale=0.0), base)
    assert np.abs(image(run, merged=True) - adapted).max() <= 1


@pytest.mark.parametrize(
    ("config", "name", "resolve"),
    [
        (dreambooth.DreamBoothConfig, "quickstart/dreambooth", dreambooth.resolve),
        (controllable.ControllableConfig, "controllable/ether_plus", controllable.resolve),
    ],
)
def test_the_tasks_configs_accept_it_and_name_it_among_the_allowed(
    config: Any, name: str, resolve: Any, tmp_path: Path
) -> None:
    found = load_config(config, name, ["adapter.method=gain", "training.learning_rate=null"])
    assert isinstance(found.adapter, GainSettings)
    assert resolve(found).training.learning_rate == 1e-2
    (tmp_path / "config.yaml").write_text(to_yaml(found))
    assert load_config(config, tmp_path / "config.yaml") == found
    with pytest.raises(
        ConfigError, match=r"adapter\.method=gian: expected one of 'ether', .*'none', 'gain', got 'gian'"
    ):
        load_config(config, name, ["adapter.method=gian"])
    with pytest.raises(
        ConfigError, match=r"adapter\.rank=3: unknown key; adapter\.method=gain has no rank; it belongs to"
    ):
        load_config(config, name, ["adapter.method=gain", "adapter.rank=3"])
    with pytest.raises(ConfigError, match=r"adapter\.gian=3: unknown key\. Allowed: method, target, init_from"):
        load_config(config, name, ["adapter.method=gain", "adapter.gian=3"])
    del METHODS["gain"]
    with pytest.raises(ConfigError, match=r"expected one of 'ether', .*'none', got 'gain'"):
        load_config(config, name, ["adapter.method=gain"])
    register_method(GainSettings)


class RankStabilised(LoraSettings):
    """A variant of a method in the table, recognised by a value of PEFT's config."""

    title = "rsLoRA"
    peft_variant: ClassVar[dict[str, Any]] = {"use_rslora": True}
    method: Literal["rslora"] = "rslora"  # pyright: ignore[reportIncompatibleVariableOverride]


def test_a_variant_of_a_shipped_method_recognises_its_own_configs() -> None:
    assert register_method(RankStabilised) is RankStabilised
    try:
        register_method(RankStabilised)  # again: nothing happens
        assert method_of(RankStabilised().peft_config()) is RankStabilised
        assert method_of(LoraSettings().peft_config()) is LoraSettings
    finally:
        del METHODS["rslora"]


def test_the_docs_example_registers_a_method_of_peft(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    try:
        exec(compile(code, "methods.md", "exec", dont_inherit=True), {"__name__": __name__})
        unet, loaded = load_base("tiny").unet, load_base("tiny").unet
        before = output(unet)
        attach(unet, METHODS["loha"].model_validate({"rank": 2}))
        assert torch.equal(output(unet), before)
        for parameter in trainable_parameters(unet).values():
            parameter.data += 0.1
        folder = ether_diffusion.save_adapter(unet, tmp_path / "adapter", base_model="tiny")
        assert ether_diffusion.load_adapter(loaded, folder).method == "LoHa"
        assert torch.equal(output(loaded), output(unet))
        set_scale(loaded, 0.0)
        torch.testing.assert_close(output(loaded), before, rtol=0, atol=1e-5)
    finally:
        METHODS.pop("loha", None)


class Nameless(GainSettings):
    method: Any = None


class Twin(GainSettings):
    pass


class Unrated(MethodSettings):
    title = "Unrated"
    method: Literal["unrated"] = "unrated"


class Unknown(GainSettings):
    peft_type = "NOWHERE"
    method: Literal["unknown"] = "unknown"  # pyright: ignore[reportIncompatibleVariableOverride]


class Stranger(GainSettings):
    method: Literal["stranger"] = "stranger"  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def recognises(cls, config: PeftConfig) -> bool:
        return False


class Greedy(LoraSettings):
    method: Literal["greedy"] = "greedy"  # pyright: ignore[reportIncompatibleVariableOverride]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Nameless, "expected a field `method: Literal"),
        (Twin, "the name 'gain' is taken by GainSettings"),
        (Unrated, "it does not state learning_rates"),
        (Unknown, "PEFT knows no 'NOWHERE'; enter it with ether_diffusion.ether.registry.register first"),
        (Stranger, r"`recognises` is false for its own peft_config\(\)"),
        (Greedy, "`recognises` is true for the configs of 'lora'"),
    ],
)
def test_an_entry_that_would_not_work_is_refused(settings: type[MethodSettings], message: str) -> None:
    before = dict(METHODS)
    with pytest.raises(ValueError, match=rf"^{settings.__name__}: {message}"):
        register_method(settings)
    assert before == METHODS


def test_peft_knows_the_toys_name_too() -> None:
    assert GainSettings().peft_config().peft_type is GainPeftType.GAIN

"""Where adapters attach: the paper's parameter counts, presets, and clear refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ether_diffusion.adapters.attach import attach, count_parameters
from ether_diffusion.adapters.methods import METHODS, EtherPlusSettings
from ether_diffusion.adapters.peft_layers import butterflies
from ether_diffusion.adapters.peft_methods import BoftSettings
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.training.controllable_config import ControllableConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig


def sd15() -> Any:
    with torch.device("meta"):
        return build_unet()


def test_the_architecture_is_stable_diffusion_v1_5() -> None:
    assert sum(parameter.numel() for parameter in sd15().parameters()) == 859_520_964


# Counts measured on the published architecture for the paper's modules, not computed by this package.
@pytest.mark.parametrize(
    ("method", "settings", "layers", "parameters"),
    [
        ("ether", {}, 128, 99_456),
        ("ether_plus", {}, 128, 398_592),
        ("lora", {}, 128, 797_184),
        ("ether", {"target": "attention+geglu"}, 144, 111_936),
        ("ether_plus", {"target": "attention+geglu"}, 144, 623_232),
        ("lora", {"target": "attention+geglu"}, 144, 1_246_464),
        ("ether_plus", {"target": "attention+geglu", "sides_pattern": {"ff.net.0.proj": "in"}}, 144, 423_552),
        ("ether", {"num_blocks": 4}, 128, 99_456),
    ],
)
def test_trainable_parameters_on_sd15(method: str, settings: dict[str, Any], layers: int, parameters: int) -> None:
    unet = sd15()
    assert len(attach(unet, METHODS[method](**settings))) == layers
    assert count_parameters(unet) == parameters


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_loras_start_has_the_deviation_that_it_states(init: str) -> None:
    """gaussian: diffusers 0.17.1's, nn.init.normal_(down, std=1 / rank); kaiming: PEFT's, uniform within 1/sqrt(in)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(320, 320))
    settings: Any = METHODS["lora"]
    attach(model, settings(target=["0"], rank=4, init_lora_weights=init))
    layer: Any = model[0]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = 1 / 4 if init == "gaussian" else 1 / math.sqrt(3 * 320)
    assert float(down.detach().std()) == pytest.approx(expected, rel=0.06)
    assert not up.any()


def test_the_papers_loras_start_as_its_ancestors() -> None:
    for task, config in (("dreambooth", DreamBoothConfig), ("controllable", ControllableConfig)):
        paper: Any = load_config(config, f"{task}/lora").adapter
        assert paper.init_lora_weights == "gaussian"
        other: Any = load_config(config, f"{task}/ether", ["adapter.method=lora"]).adapter
        assert other.init_lora_weights == "kaiming"


def test_each_preset_adds_the_layers_that_it_names() -> None:
    """16 transformer blocks, each with 8 attention linears, a GEGLU projection, one after it; 2 projections around."""
    matched = {
        name: attach(sd15(), METHODS["ether"](target=name))
        for name in ("attention", "attention+geglu", "linear", "all")
    }
    assert [len(names) for names in matched.values()] == [128, 144, 160, 192]
    assert all(".transformer_blocks." in name for name in matched["linear"])
    assert {name.rsplit(".", 1)[1] for name in set(matched["all"]) - set(matched["linear"])} == {"proj_in", "proj_out"}


def test_patterns_lists_and_regular_expressions() -> None:
    assert len(attach(sd15(), METHODS["ether"](target=["to_q", "attn2.to_v"]))) == 48
    assert len(attach(sd15(), METHODS["ether"](target=r"mid_block\..*\.to_[qkv]"))) == 6


@pytest.mark.parametrize(
    ("target", "near"), [("attentoin", "attention"), (["to_qq"], "to_q"), ("ff.net.0.prj", r"ff\.net\.0\.proj|net\.0")]
)
def test_an_empty_match_is_an_error_with_near_misses(target: str | list[str], near: str) -> None:
    unet = sd15()
    with pytest.raises(UserError, match=rf"matches no .* Near: .*{near}.* Presets: attention, attention\+geglu"):
        attach(unet, METHODS["ether_plus"](target=target))
    assert not hasattr(unet, "peft_config")


def test_the_page_of_methods_states_their_facts() -> None:
    """The table of docs/methods.md has a row for each method, with the facts of its settings class."""
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    rows = {cells[0].strip("`"): cells for cells in table[1:] if len(cells) == 8}
    assert list(rows) == list(METHODS)
    kernels = {"yes": "all", "square": "square", "1 x 1": "1x1", "no": "none"}
    for name, (_, _, _, rates, merges, scale, convolutions, text_encoder) in rows.items():
        facts = METHODS[name]
        shown = [None if rate == "-" else float(rate) for rate in rates.split(", ")]
        assert shown == [facts.learning_rates.get(task) for task in ("dreambooth", "controllable")], name
        assert (merges == "yes") == facts.merges, name
        if facts.peft_type:
            assert (scale == "yes", kernels[convolutions], text_encoder) == (
                facts.has_scale,
                facts.convolutions,
                "yes",
            ), name
    reading = next(line for line in page.splitlines() if "read weights that `--offload sequential`" in line)
    titles = [facts.title for facts in METHODS.values() if not facts.sequential_offload]
    assert reading.startswith(f"{', '.join(titles[:-1])} and {titles[-1]} read")


# Each counted by hand from the shapes: 128 layers with d inputs and f outputs; sum d = 99,456, sum f = 99,840,
# sum d^2 = 93,216,768.
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dora", 797_184 + 99_840),
        ("boft", 93_216_768 // 8 + 99_840),
        ("hra", 8 * 99_456),
        ("vera", 99_840 + 128 * 256),
        ("delora", 8 * (99_456 + 99_840) + 128),
    ],
)
def test_trainable_parameters_of_other_methods(method: str, parameters: int) -> None:
    unet = sd15()
    attach(unet, METHODS[method]())
    assert count_parameters(unet) == parameters


@pytest.mark.parametrize(
    ("target", "free", "paper"),
    [("attention", 11_602_368, 11_652_096), ("attention+geglu", 13_144_928, 13_200_896)],
)
def test_oft_counted_both_ways(target: str, free: int, paper: int) -> None:
    """The free entries of a skew matrix of width D are D (D - 1) / 2; the paper counts D^2 / 2."""
    unet = sd15()
    widths = [unet.get_submodule(name).in_features // 4 for name in attach(sd15(), METHODS["oft"](target=target))]
    assert sum(4 * D * D // 2 for D in widths) == paper
    attach(unet, METHODS["oft"](target=target))
    assert count_parameters(unet) == free


@pytest.mark.parametrize("method", ["oft", "boft", "naive"])
def test_blocks_that_do_not_divide_a_layer_are_refused(method: str) -> None:
    """PEFT's OFT would take another number, with a warning."""
    unet = sd15()
    with pytest.raises(UserError, match=r"^adapter(\.method)?: .*num_blocks = 7\b") as refused:
        attach(unet, METHODS[method].model_validate({"num_blocks": 7}))
    assert "\n" not in str(refused.value)
    assert not hasattr(unet, "peft_config")


def test_more_butterflies_than_peft_can_build_are_refused() -> None:
    """PEFT would take one, with a warning."""
    if butterflies():
        pytest.skip("PEFT's CUDA extension for butterflies can be built here, and nothing is refused")
    with pytest.raises(UserError, match=r"butterfly_factors = 2 needs PEFT's CUDA extension"):
        attach(sd15(), BoftSettings(butterfly_factors=2))


def test_a_model_can_be_adapted_again_after_a_refusal() -> None:
    unet = load_base("tiny").unet
    with pytest.raises(UserError, match="num_blocks = 7"):
        attach(unet, EtherPlusSettings(num_blocks=7))
    assert len(attach(unet, EtherPlusSettings(num_blocks=2))) == 56

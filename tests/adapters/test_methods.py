"""Where adapters attach: the paper's parameter counts, presets, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ether_diffusion.adapters.attach import attach, count_parameters, detach, merge
from ether_diffusion.adapters.methods import METHODS, EtherPlusSettings
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.stable_diffusion_v1 import build_unet


def sd15() -> nn.Module:
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


def test_presets_grow_by_what_they_name() -> None:
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


@pytest.mark.parametrize("method", METHODS)
def test_attach_draws_from_its_seed_alone(method: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))  # the global generator has no say, and is left as it was
        before = torch.get_rng_state()
        base = load_base("tiny")
        attach(base.unet, METHODS[method](), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({name: p.clone() for name, p in base.unet.named_parameters() if p.requires_grad})
    same = [all(torch.equal(states[0][key], other[key]) for key in other) for other in states[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_in_fp32(method: str, dtype: torch.dtype) -> None:
    unet = load_base("tiny", dtype).unet
    unet.requires_grad_(True)
    attach(unet, METHODS[method]())
    for name, parameter in unet.named_parameters():
        ours = ".ether_" in name or ".lora_" in name
        assert parameter.requires_grad == ours
        assert parameter.dtype == (torch.float32 if ours else dtype)


def sample(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 40, 128, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([10, 500]), c).sample


@pytest.mark.parametrize("method", METHODS)
def test_detach_restores_the_model_and_merge_keeps_the_outputs(method: str) -> None:
    unet = load_base("tiny").unet
    names, before = [name for name, _ in unet.named_modules()], sample(unet)
    attach(unet, METHODS[method]())
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adapted = sample(unet)
    assert not torch.allclose(adapted, before, atol=1e-4)
    detach(unet)
    assert [name for name, _ in unet.named_modules()] == names
    assert torch.equal(sample(unet), before)

    attach(unet, METHODS[method]())
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    merge(unet)
    assert [name for name, _ in unet.named_modules()] == names
    assert torch.allclose(sample(unet), adapted, atol=2e-5)
    assert not hasattr(unet, "peft_config")


def test_a_model_can_be_adapted_again_after_a_refusal() -> None:
    unet = load_base("tiny").unet
    with pytest.raises(UserError, match="num_blocks = 7"):
        attach(unet, EtherPlusSettings(num_blocks=7))
    assert len(attach(unet, EtherPlusSettings(num_blocks=2))) == 56

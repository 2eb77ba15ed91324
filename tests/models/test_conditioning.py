"""Laws of the conditioned UNet: its hint is added once, to its own image, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import ConditionEncoder, build_condition_encoder
from ether_diffusion.models.conditioning import ConditionedUNet, added_features

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def unet() -> Any:
    return load_base("tiny").unet


@pytest.fixture
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(0)
    latents, hidden = torch.randn(3, 8, 16, 16, generator=g), torch.randn(3, 77, 128, generator=g)
    return latents, torch.tensor([1, 400, 999]), hidden


@pytest.fixture
def hint() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(unet: nn.Module) -> ConditionEncoder:
    """An encoder that has something to say."""
    encoder = build_condition_encoder(unet, 4)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return encoder


@torch.no_grad()
def test_step_zero_with_ether_plus_is_the_base_bit_for_bit(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    base = unet(*inputs).sample
    attach(unet, EtherPlusSettings(target="attention+geglu"))
    assert torch.equal(ConditionedUNet(unet, build_condition_encoder(unet, 4))(*inputs, hint), base)


@torch.no_grad()
def test_features_are_added_once_after_the_first_convolution(unet: Any, inputs: Inputs, hint: Tensor) -> None:
    encoder, seen = trained(unet), {}
    unet.conv_in.register_forward_hook(lambda module, args, output: seen.update(convolution=output))
    unet.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(block=kwargs["hidden_states"]), with_kwargs=True
    )
    ConditionedUNet(unet, encoder)(*inputs, hint)
    features = encoder(hint)
    assert features.abs().max() > 0.01
    assert torch.equal(seen["block"], seen["convolution"] + features)


@torch.no_grad()
def test_nothing_stays_behind(unet: Any, inputs: Inputs) -> None:
    base, convolution, keys = unet(*inputs).sample, unet.conv_in, list(unet.state_dict())
    features = torch.randn(3, 64, 16, 16)
    with added_features(unet, features):
        assert not torch.equal(unet(*inputs).sample, base)
    with pytest.raises(KeyboardInterrupt), added_features(unet, features):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not a whole number of them"), added_features(unet, features[:2]):
        unet(*inputs)
    assert unet.conv_in is convolution
    assert list(unet.state_dict()) == keys
    assert torch.equal(unet(*inputs).sample, base)


def test_features_are_never_added_twice(unet: Any) -> None:
    features = torch.zeros(1, 64, 16, 16)
    with (
        added_features(unet, features),
        pytest.raises(RuntimeError, match="added once"),
        added_features(unet, features),
    ):
        pass

"""The condition encoder: against ControlNet's own hint block, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import (
    WHAT,
    ConditionEncoder,
    build_condition_encoder,
    find_condition_encoder,
    load_condition_encoder,
)
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.models.module_files import CONFIG, WEIGHTS, fill_module, module_digest, save_module

TINY: Any = load_base("tiny").unet


@pytest.mark.parametrize("vae_factor", [4, 8])
def test_a_hint_reaches_the_last_convolution(vae_factor: int) -> None:
    """Places of a hint that differ also differ in the input of the last convolution; with PyTorch's own initial weights
    they differ a hundredth as much or less."""
    encoder = build_condition_encoder(TINY, vae_factor)
    seen = []
    encoder.embedding.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    palette = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(20, (8, 8, 8), generator=torch.Generator().manual_seed(1))
    hint = palette[labels].permute(0, 3, 1, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)  # (8, 3, 128, 128)
    encoder(hint)
    between_places = [tensor.std(dim=(0, 2, 3)).square().mean().sqrt() for tensor in (hint, seen[0])]
    assert between_places[1] > between_places[0] / 4


def filled(encoder: ConditionEncoder, seed: int = 0) -> ConditionEncoder:
    """The encoder with no weight at zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder


def test_parameters_for_stable_diffusion_v1() -> None:
    with torch.device("meta"):
        encoder = build_condition_encoder(build_unet(), vae_factor=8)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_086_480
    assert encoder.factor == 8


@pytest.mark.parametrize(("factor", "channels"), [(8, (16, 32, 96, 256)), (4, (16, 32, 96))])
def test_features_equal_those_of_a_controlnet_with_the_same_weights(factor: int, channels: tuple[int, ...]) -> None:
    controlnet = ControlNetModel(
        block_out_channels=(64,),
        down_block_types=("DownBlock2D",),
        norm_num_groups=16,
        conditioning_embedding_out_channels=channels,
    )
    encoder = filled(build_condition_encoder(TINY, factor))
    assert controlnet.controlnet_cond_embedding.load_state_dict(encoder.embedding.state_dict())
    hint = torch.rand(2, 3, 32, 64)
    expected = controlnet.controlnet_cond_embedding(hint)
    assert torch.equal(encoder(hint), expected)
    assert expected.shape == (2, 64, 32 // factor, 64 // factor)


def test_an_untrained_encoder_adds_nothing() -> None:
    assert not build_condition_encoder(TINY, 4)(torch.rand(1, 3, 64, 64)).any()


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build_condition_encoder(TINY, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = build_condition_encoder(TINY, 4, seed=7), build_condition_encoder(TINY, 4, seed=8)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key])
    assert not torch.equal(one.embedding.conv_in.weight, other.embedding.conv_in.weight)


def test_a_factor_without_convolutions_is_refused() -> None:
    with pytest.raises(UserError, match="16 pixels per latent; allowed: 1, 2, 4, 8"):
        build_condition_encoder(TINY, 16)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    encoder, hint = filled(build_condition_encoder(TINY, 4)), torch.rand(2, 3, 32, 32)
    gradients = []
    for on in (False, True):
        encoder.zero_grad()
        (encoder.enable_gradient_checkpointing if on else encoder.disable_gradient_checkpointing)()
        encoder(hint).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == 12
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_round_trip_is_exact_and_frozen(tmp_path: Path) -> None:
    encoder = filled(build_condition_encoder(TINY, 4))
    folder = save_module(encoder, tmp_path / "condition_encoder")
    loaded = load_condition_encoder(folder, TINY)
    assert list(loaded.config["block_channels"]) == list(encoder.config["block_channels"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["condition_encoder", CONFIG, WEIGHTS]
    # As any diffusers model
    again = ConditionEncoder.from_pretrained(folder)
    assert torch.equal(again.embedding.conv_out.weight, encoder.embedding.conv_out.weight)


def test_equal_encoders_give_equal_files(tmp_path: Path) -> None:
    encoder = filled(build_condition_encoder(TINY, 4))
    one = save_module(filled(build_condition_encoder(TINY, 4), seed=3), tmp_path / "one")
    other_digest = module_digest(one)
    save_module(encoder, one)
    two = save_module(load_condition_encoder(one, TINY), tmp_path / "two")
    assert module_digest(one) == module_digest(two) != other_digest
    assert (one / CONFIG).read_bytes() == (two / CONFIG).read_bytes()


def test_filling_keeps_the_parameters_that_an_optimiser_holds(tmp_path: Path) -> None:
    folder = save_module(filled(build_condition_encoder(TINY, 4)), tmp_path / "encoder")
    encoder = build_condition_encoder(TINY, 4, seed=5)
    held = list(encoder.parameters())
    fill_module(encoder, folder, WHAT)
    assert all(now is then and now.requires_grad for now, then in zip(encoder.parameters(), held, strict=True))
    assert torch.equal(
        encoder.state_dict()["embedding.conv_out.bias"], load_file(folder / WEIGHTS)["embedding.conv_out.bias"]
    )


def test_found_in_a_run_its_adapter_folder_and_its_last_checkpoint(tmp_path: Path) -> None:
    encoder = build_condition_encoder(TINY, 4)
    assert find_condition_encoder(tmp_path) is None
    (tmp_path / CONFIG).write_text('{"_class_name": "UNet2DConditionModel"}')  # a folder of another model
    assert find_condition_encoder(tmp_path) is None
    for step in (2, 999_999, 1_000_000):
        last = save_module(encoder, tmp_path / f"checkpoints/step-{step:06d}/condition_encoder")
    assert find_condition_encoder(tmp_path) == last
    final = save_module(encoder, tmp_path / "condition_encoder")
    for path in (tmp_path, tmp_path / "adapter", final):
        assert find_condition_encoder(path) == final
    with pytest.raises(UserError, match="nowhere holds no condition encoder"):
        load_condition_encoder(tmp_path / "nowhere", TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("embedding.conv_in.bias"), "1 missing, e.g. embedding.conv_in.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "1 left over, e.g. more"),
        (
            lambda state: state.update({"embedding.conv_in.bias": torch.zeros(8)}),
            r"1 of another shape, .*conv_in.bias is \(8,\) in the file and \(16,\) in the model",
        ),
        (lambda state: state.update({"embedding.conv_in.bias": torch.zeros(16).half()}), "is float16, not float32"),
        (lambda state: state["embedding.conv_in.bias"].fill_(torch.nan), "conv_in.bias holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_module(build_condition_encoder(TINY, 4), tmp_path / "encoder")
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError, match=message) as caught:
        load_condition_encoder(folder, TINY)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_encoder_are_refused(tmp_path: Path) -> None:
    folder = save_module(build_condition_encoder(TINY, 4), tmp_path / "encoder")
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        load_condition_encoder(folder, TINY)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="weights are missing"):
        load_condition_encoder(folder, TINY)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "block_channels": "wide"}))
    with pytest.raises(UserError, match="not the config of a condition encoder"):
        load_condition_encoder(folder, TINY)


def test_an_encoder_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = save_module(ConditionEncoder(320, (16, 32, 96)), tmp_path / "encoder")
    with pytest.raises(UserError, match="320 channels, and the UNet's first convolution has 64"):
        load_condition_encoder(folder, TINY)


@pytest.mark.parametrize("config", [None, "", "[]", "{", '{"in_channels": "x"}'])
def test_a_run_whose_encoder_lacks_its_config_is_refused(config: str | None, tmp_path: Path) -> None:
    folder = save_module(build_condition_encoder(TINY, 4), tmp_path / "condition_encoder")
    (folder / CONFIG).unlink()
    if config is not None:
        (folder / CONFIG).write_text(config)
    with pytest.raises(UserError, match=r"condition_encoder/config\.json: missing, or not the config of a Condition"):
        find_condition_encoder(tmp_path)
    (tmp_path / "run/condition_encoder").mkdir(parents=True)  # a run of this name
    assert find_condition_encoder(tmp_path / "run/condition_encoder") is None

"""The training of the miniature's weights: its tokenizer, its stages, its files."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from ether_diffusion.tinyworld.phrasing import VOCABULARY, caption, training_caption
from ether_diffusion.tinyworld.pretrain import __main__ as making
from ether_diffusion.tinyworld.pretrain.autoencoder import autoencoder_stage, standardise
from ether_diffusion.tinyworld.pretrain.export import digests, export
from ether_diffusion.tinyworld.pretrain.networks import random_network
from ether_diffusion.tinyworld.pretrain.rendered import Pictures
from ether_diffusion.tinyworld.pretrain.stage import Stage, State, train
from ether_diffusion.tinyworld.scenes import is_held_out, sample_scene, sample_view
from ether_diffusion.tinyworld.scoring import load_scorers
from ether_diffusion.tinyworld.tokenizer import MAX_LENGTH, build_tokenizer, learn_merges


@pytest.fixture
def few_sampling_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser's stage samples 32 images to look at."""
    monkeypatch.setattr("ether_diffusion.tinyworld.figures.STEPS", 1)


def test_every_word_of_the_world_is_one_token_and_any_other_text_has_one() -> None:
    tokenizer = build_tokenizer(VOCABULARY)
    for word in VOCABULARY:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    for text in ("qwe", "ünïcødé 犬 😀", "; -- '", "Snowboard"):
        ids = tokenizer(text)["input_ids"][1:-1]
        assert tokenizer.unk_token_id not in ids
        decoded: Any = tokenizer.decode(ids)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_every_caption_fits() -> None:
    tokenizer = build_tokenizer(VOCABULARY)
    lengths = [len(tokenizer(caption(sample_scene(seed), seed))["input_ids"]) for seed in range(500)]
    assert max(lengths) < MAX_LENGTH


def test_merges_are_those_of_the_papers_example() -> None:
    """Sennrich et al. 2016: the most frequent pair is merged first."""
    assert learn_merges(["lower", "lowest"])[:3] == [("l", "o"), ("lo", "w"), ("low", "e")]


def test_unknown_words_come_before_a_class() -> None:
    texts = [training_caption(sample_scene(3), seed) for seed in range(400)]
    strange = [text for text in texts if not set(text.split()) <= set(VOCABULARY)]
    assert 0.05 < len(strange) / len(texts) < 0.2
    for text in strange:
        words = text.split()
        where = next(k for k, word in enumerate(words) if word not in VOCABULARY)
        assert len(words[where]) == 3
        assert words[where + 1] in {thing.kind for thing in sample_scene(3).things}


def test_views_of_an_individual_differ_only_in_place_and_are_never_held_out() -> None:
    for k in range(50):
        one, two = (sample_view(2 * k + view).things[0] for view in (0, 1))
        assert (one.kind, one.colour, one.look) == (two.kind, two.colour, two.look)
        assert (one.x, one.size) != (two.x, two.size)
        for view in (0, 1):
            scene = sample_view(2 * k + view)
            assert not is_held_out(one.kind, one.colour, scene.setting)


def stage(module: nn.Module, steps: int) -> Stage:
    def loss(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": module(x).square().mean()}

    return Stage("toy", module, loss, lambda path: {}, steps, learning_rate=0.01)


def test_an_interrupted_stage_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ether_diffusion.tinyworld.pretrain.stage.SAVE_EVERY", 5)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # its statistics are buffers

    whole = train(stage(network(), 12), tmp_path / "whole")
    stopped = stage(network(), 12)
    calls = []

    def loss(step: int) -> dict[str, torch.Tensor]:
        calls.append(step)
        if step == 9:
            raise KeyboardInterrupt
        return stage(stopped.module, 12).loss(step)

    with pytest.raises(KeyboardInterrupt):
        train(Stage("toy", stopped.module, loss, stopped.validate, 12, 0.01), tmp_path / "parts")
    again = train(stage(network(), 12), tmp_path / "parts")
    assert calls[-1] == 9
    assert whole.keys() == network().state_dict().keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    left, right = (load_file(tmp_path / name / "toy.safetensors") for name in ("whole", "parts"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_stage_is_restored_to_the_device_of_its_parameters(tmp_path: Path) -> None:
    """`meta` stands for a device other than the CPU, where the file is read."""
    path = tmp_path / "toy.safetensors"

    def made(device: str) -> State:
        module = nn.Linear(3, 2, device=device)
        return State(module, torch.optim.AdamW(module.parameters(), fused=device == "cpu"))

    state = made("cpu")
    sum(p.square().sum() for p in state.parameters.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    state.optimizer.step()
    state.save(path, 1)
    elsewhere = made("meta")
    assert elsewhere.load(path) == 1
    moments = elsewhere.optimizer.state
    for parameter in elsewhere.parameters.values():
        assert moments[parameter]["exp_avg"].device == moments[parameter]["exp_avg_sq"].device
        assert moments[parameter]["exp_avg"].device == parameter.device
    elsewhere.optimizer.param_groups[0]["fused"] = True  # its kernels need the step count on the weights' device
    elsewhere.load(path)
    assert {values["step"].device.type for values in elsewhere.optimizer.state.values()} == {"meta"}


def test_the_autoencoders_noise_is_a_function_of_the_step(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, 8, workers=1)
    stage = autoencoder_stage(random_network("autoencoder"), pictures, pictures, 2)
    with torch.no_grad():
        first, again, other = (float(stage.loss(step)["loss"]) for step in (1, 1, 2))
    assert first == again != other


def test_pictures_of_another_renderer_are_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Pictures(tmp_path, 4, workers=1).images(torch.arange(4))
    path = next(tmp_path.glob("*.npy"))
    written = path.stat().st_mtime_ns
    Pictures(tmp_path, 4, workers=1)
    assert path.stat().st_mtime_ns == written
    Pictures(tmp_path, 4, first=100, workers=1)
    assert path.stat().st_mtime_ns != written
    assert torch.equal(Pictures(tmp_path, 4, workers=1).images(torch.arange(4)), first)


def test_standardised_latents_have_mean_0_and_deviation_1_and_decode_to_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae: Any = random_network("autoencoder").eval()
    pictures = Pictures(tmp_path, 16, workers=1)
    pixels = pictures.images(torch.arange(16))
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        decoded = vae.decode(before.mean).sample
        standardise(vae, pictures, samples=16)
        after = vae.encode(pixels).latent_dist
        again = vae.decode(after.mean).sample
    assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-4)
    assert torch.allclose(after.std, before.std / before.mean.std(dim=(0, 2, 3))[:, None, None], rtol=1e-3)
    assert torch.allclose(again, decoded, atol=1e-4)


@pytest.mark.parametrize(("only", "unet"), [pytest.param("denoiser", True, marks=pytest.mark.slow), ("clip", False)])
def test_one_stage_trained_from_the_shipped_weights_is_written_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_sampling_steps: None, only: str, unet: bool
) -> None:
    arguments = ["--only", only, "--from", "shipped", "--scale", "1e-5", "--device", "cpu", "--to", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    making.main()
    record = json.loads((tmp_path / "weights" / "making.json").read_text())
    assert record["steps"] == {only: 1}
    assert {path.stem for path in tmp_path.glob("*.safetensors") if "latents" not in path.name} == {only}
    shipped, scorers = load_scorers(), load_scorers(tmp_path / "weights")
    for name in {"clip", "backbone", "segmenter"} - {only}:
        ours, theirs = getattr(scorers, name).state_dict(), getattr(shipped, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert (tmp_path / "weights/pipeline/unet").is_dir() == unet  # a UNet does not fit another text tower
    if unet:
        StableDiffusionPipeline.from_pretrained(tmp_path / "weights/pipeline")


@pytest.mark.slow
def test_plain_libraries_load_what_a_tiny_run_writes(tmp_path: Path, few_sampling_steps: None) -> None:
    arguments = Namespace(to=tmp_path, device="cpu", scale=1e-5, start="nothing", compile=False)
    small = making.Making(arguments)
    for name in making.STAGES:
        small.run(name)
    folder = export(small.networks, small.tokenizer, tmp_path / "weights", {"steps": small.steps})
    record = json.loads((folder / "making.json").read_text())
    assert record["sha256"] == digests(folder)
    assert "pipeline/unet/diffusion_pytorch_model.safetensors" in record["sha256"]
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red ball", "anything ☂"], num_inference_steps=2).images
    scorers = load_scorers(folder)
    text = scorers.clip.text_model.state_dict()
    shared = pipeline.text_encoder.state_dict()
    assert text.keys() == shared.keys()
    assert all(torch.equal(text[key], shared[key]) for key in text)
    assert scorers.identity(images).shape == scorers.image_features(images).shape == (2, 128)
    assert scorers.segment(images).min() >= 1

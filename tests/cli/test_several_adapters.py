"""`generate` and `export` with several adapters and LoRA files: how they are named, recorded, refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ether_diffusion.adapters.attach import attach, trainable_parameters
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import load_pipeline, read_sum
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.module_files import save_module
from ether_diffusion.pictures import read_settings, save_png
from ether_diffusion.randomness import generator
from ether_diffusion_cli import main
from ether_diffusion_cli.arguments import with_strength

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PROMPT = ["--prompt", "a red ball", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` (ETHER+), `b` (Naive) and `maps` (ETHER, with a condition encoder), and `lora.safetensors`."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in (("a", "ether_plus"), ("b", "naive"), ("maps", "ether")):
        unet = load_base("tiny").unet
        attach(unet, METHODS[method](target="attention"))
        for parameter in trainable_parameters(unet).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator(0, name))
        save_adapter(unet, root / name / "adapter", base_model="tiny")
    base = load_base("tiny")
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    with torch.no_grad():
        encoder.get_parameter("embedding.conv_out.weight").normal_(generator=generator(0, "encoder"))
    save_module(encoder, root / "maps/condition_encoder")
    width = base.unet.get_parameter(f"{LAYER}.weight").shape[0]
    tensors = {"down": torch.randn(2, width, generator=generator(0, "down")), "up": torch.ones(width, 2) / 4}
    key = f"lora_unet_{LAYER.replace('.', '_')}"
    save_file({f"{key}.lora_{role}.weight": value for role, value in tensors.items()}, root / "lora.safetensors")
    labels = np.full((64, 64), 3, np.uint8)
    labels[20:, 10:50] = 13
    save_png(Image.fromarray(labels), root / "map.png")
    return root


@pytest.fixture
def call(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A command in the folder of the runs: exit code, and errors."""
    monkeypatch.chdir(runs)

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run


def image(folder: Path) -> np.ndarray:
    (file,) = [file for file in folder.glob("*.png") if file.stem not in ("grid", "contact_sheet")]
    return np.asarray(Image.open(file)).astype(int)


def test_a_path_may_hold_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    assert with_strength("runs/a") == ("runs/a", 1.0)
    assert with_strength("runs/a:0.8") == ("runs/a", 0.8)
    assert with_strength("runs/a:-1e-1") == ("runs/a", -0.1)
    assert with_strength("run:2") == ("run:2", 1.0), "what exists as a whole is a path"
    assert with_strength("run:2:0.5") == ("run:2", 0.5)
    assert with_strength("run:3") == ("run", 3.0)
    assert with_strength(r"C:\\runs\\a") == (r"C:\\runs\\a", 1.0)
    assert with_strength(r"C:\\runs\\a:0.5") == (r"C:\\runs\\a", 0.5)
    assert with_strength("runs/a:") == ("runs/a:", 1.0)
    assert with_strength("0.5") == ("0.5", 1.0)
    assert with_strength("a" * 5000 + ":0.5") == ("a" * 5000, 0.5)
    for text in ("runs/a:nan", "runs/a:inf", "runs/a:1e9"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected a number from -1,000 to 1,000"):
            with_strength(text)


def test_one_alone_is_the_same_adapter_at_its_scale(call: Any, tmp_path: Path) -> None:
    common = ["generate", *PROMPT, "--output"]
    assert call(*common, tmp_path / "colon", "--adapter", "a:0.5")[0] == 0
    assert call(*common, tmp_path / "scale", "--adapter", "a", "--scale", "0.5")[0] == 0
    assert (image(tmp_path / "colon") == image(tmp_path / "scale")).all()
    (file,) = (tmp_path / "colon").glob("0*.png")
    settings = read_settings(file)
    assert settings is not None
    assert (settings["scale"], "weight_changes" in settings) == (0.5, False)


def test_several_are_recorded_and_resumed_in_any_order(call: Any, tmp_path: Path) -> None:
    common = ["generate", *PROMPT, "--output", tmp_path / "out"]
    parts = ["--adapter", "a:0.8", "--adapter", "b:0.5", "--lora", "lora.safetensors:0.6"]
    assert call(*common, *parts) == (0, "")
    (file,) = (tmp_path / "out").glob("0*.png")
    made, settings = file.stat().st_mtime_ns, read_settings(file)
    assert settings is not None
    expected = read_sum([("a", 0.8), ("b", 0.5), ("lora.safetensors", 0.6)]).record()
    assert settings["weight_changes"] == expected
    rows = (tmp_path / "out/images.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["weight_changes"] == expected
    assert call(*common, *parts[2:], *parts[:2]) == (0, "")
    assert file.stat().st_mtime_ns == made, "kept"
    for others in (
        ["--adapter", "a:0.8", *parts[2:4]],
        ["--adapter", "a"],
        ["--base-model", "tiny"],
        [*parts, "--scale", "2"],
    ):
        code, error = call(*common, *others)
        assert (code, "was made with " in error) == (2, True), error
    together, alone = image(tmp_path / "out"), tmp_path / "alone"
    assert call("generate", *PROMPT, "--adapter", "a:0.8", "--output", alone)[0] == 0
    assert np.abs(together - image(alone)).max() > 2


def test_exported_and_loaded_again_they_make_the_same_image(call: Any, tmp_path: Path) -> None:
    """Through a LoRA file as well as merged: to one step of 255."""
    parts = ["--adapter", "a:0.8", "--adapter", "maps:0.5", "--lora", "lora.safetensors:0.6"]
    assert call("export", *parts[:2], *parts[4:], "--output", tmp_path / "x.safetensors", "--dtype", "fp32")[0] == 0
    assert call("generate", *PROMPT, *parts[:2], *parts[4:], "--output", tmp_path / "live")[0] == 0
    assert call("generate", *PROMPT, "--lora", tmp_path / "x.safetensors", "--output", tmp_path / "file") == (0, "")
    assert np.abs(image(tmp_path / "live") - image(tmp_path / "file")).max() <= 1
    with_naive = ["a:0.8", "b:0.5", "--lora", "lora.safetensors:0.6"]
    assert call("export", *with_naive, "--format", "merged", "--dtype", "fp32", "--output", tmp_path / "merged")[0] == 0
    options = ["--adapter", "a:0.8", "--adapter", "b:0.5", *with_naive[2:]]
    assert call("generate", *PROMPT, *options, "--output", tmp_path / "live2")[0] == 0
    assert call("generate", *PROMPT, "--base-model", tmp_path / "merged", "--output", tmp_path / "plain")[0] == 0
    assert (image(tmp_path / "live2") == image(tmp_path / "plain")).all()


def test_a_controllable_run_takes_a_subject_with_it(call: Any, tmp_path: Path) -> None:
    """The encoder is the controllable run's, whatever the order; a subject at strength 0 has no effect."""
    common = ["generate", *PROMPT, "--steps", "2", "--condition", "map.png", "--output"]  # DDIM's one step is the last
    both = ["--adapter", "a:0.8", "--adapter", "maps"]
    assert call(*common, tmp_path / "both", *both) == (0, "")
    assert call(*common, tmp_path / "swapped", *both[2:], *both[:2]) == (0, "")
    assert call(*common, tmp_path / "alone", "--adapter", "maps") == (0, "")
    assert (image(tmp_path / "both") == image(tmp_path / "swapped")).all()
    assert call(*common, tmp_path / "ignored", *both, "--condition-scale", 0) == (0, "")
    for other in ("alone", "ignored"):
        assert np.abs(image(tmp_path / "both") - image(tmp_path / other)).max() > 2, other
    zero = ["--adapter", "a:0", "--adapter", "maps"]
    assert call(*common, tmp_path / "zero", *zero) == (0, "")
    assert np.abs(image(tmp_path / "zero") - image(tmp_path / "alone")).max() <= 1
    (file,) = (tmp_path / "both").glob("map-*.png")
    assert {"condition_encoder", "weight_changes"} <= (read_settings(file) or {}).keys()


def test_a_sum_is_rounded_once_and_can_be_quantised(runs: Path) -> None:
    parts = [(runs / "a", 0.8), (runs / "b", 0.5)]
    exact, half = (load_pipeline(parts, device="cpu", dtype=dtype)[0] for dtype in ("fp32", "bf16"))
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(half, part).state_dict()
        assert all(
            torch.equal(weights[key], w.to(weights[key].dtype)) for key, w in getattr(exact, part).state_dict().items()
        )
        assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.bfloat16}
    quantised = load_pipeline(parts, device="cpu", dtype="fp32", quantization="torchao_int8")[0]
    near, far = (
        p.unet.get_submodule(LAYER) for p in (quantised, load_pipeline(None, base_model="tiny", device="cpu")[0])
    )
    x, wanted = torch.eye(near.in_features), exact.unet.get_submodule(LAYER)
    error, change = (float((layer(x) - wanted(x)).norm()) for layer in (near, far))
    assert error < 0.05 * change


def test_where_the_images_of_several_go(call: Any, runs: Path) -> None:
    assert call("generate", *PROMPT, "--adapter", "a", "--lora", "lora.safetensors", "--base-model", "tiny")[0] == 0
    assert (runs / "images/a-lora-a-red-ball/images.jsonl").is_file()
    shutil.rmtree(runs / "images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a", "--adapter", "none:0.5"], "none is not a folder; expected a run folder"),
        (["--adapter", "a", "--lora", "none.safetensors:0.5"], "none.safetensors: not found"),
        (["--adapter", "maps", "--adapter", "maps2"], "maps and maps2 have a condition encoder each"),
        (["--adapter", "a", "--adapter", "whole"], "whole is a whole UNet: only adapters and LoRA files add up"),
        (["--adapter", "a", "--adapter", "other"], "a was trained on the base tiny, other was trained on"),
        (["--adapter", "a", "--lora", "wrong.safetensors"], "which has none of its 1 layers; not, e.g., lora"),
        (["--lora", "lora.safetensors"], "No base model"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_one_line(
    options: list[str], message: str, runs: Path, call: Any, tmp_path: Path
) -> None:
    if not (runs / "maps2").is_dir():
        shutil.copytree(runs / "maps", runs / "maps2")
        shutil.copytree(runs / "a", runs / "other")
        config = runs / "other/adapter/adapter_config.json"
        config.write_text(config.read_text().replace('"tiny"', '"else"'))
        save_file(
            {f"lora_unet_wrong.lora_{role}.weight": torch.ones(2, 2) for role in ("up", "down")},
            runs / "wrong.safetensors",
        )
        save_module(load_base("tiny").unet, runs / "whole/unet")
    code, error = call("generate", *PROMPT, *options, "--output", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_strength_is_a_number_within_bounds() -> None:
    for strength in (float("nan"), 2000.0):
        with pytest.raises(UserError, match="expected a number within ±1000"):
            read_sum([("a", strength)])

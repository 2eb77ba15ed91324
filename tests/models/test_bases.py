"""Base models: the miniature, diffusers folders, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import check_base, check_resolution, fingerprint, load_base
from ether_diffusion.models.families.stable_diffusion_v1 import clip_tokenizer
from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.tinyworld.pretrain.card import PIPELINE


def test_tiny_is_the_same_every_time_and_does_not_use_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = load_base("tiny"), load_base("tiny")
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(one.unet) == fingerprint(two.unet)
    assert one.unet.dtype == one.vae.dtype == one.text_encoder.dtype == torch.float32


def test_tiny_has_the_block_types_of_stable_diffusion() -> None:
    unet = load_base("tiny").unet
    names = {type(module).__name__ for module in unet.modules()}
    assert {"CrossAttnDownBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn", "GEGLU", "Attention"} <= names


def test_a_folder_saved_by_diffusers_is_the_same_base(tmp_path: Path) -> None:
    base = load_base("tiny")
    base.pipeline().save_pretrained(tmp_path / "folder")
    again = load_base(str(tmp_path / "folder"))
    for part in ("unet", "vae", "text_encoder"):
        assert fingerprint(getattr(again, part)) == fingerprint(getattr(base, part))
    assert again.tokenizer("a photo of qwe dog")["input_ids"] == base.tokenizer("a photo of qwe dog")["input_ids"]
    assert again.prediction_type == base.prediction_type == "v_prediction"
    assert not any(p.requires_grad for p in again.unet.parameters())
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    assert fingerprint(plain.unet) == fingerprint(base.unet)


def test_half_precision_applies_to_every_part() -> None:
    base = load_base("tiny", torch.bfloat16)
    assert {base.unet.dtype, base.vae.dtype, base.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("text", ["a photo of qwe dog", "", "ünïcødé 犬 😀", "a" * 500, "<|endoftext|> '; --"])
def test_the_miniature_tokenizer_takes_any_prompt(text: str) -> None:
    tokenizer = load_base("tiny").tokenizer
    ids = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == tokenizer.model_max_length
    assert tokenizer.unk_token_id not in ids[1 : ids.index(tokenizer.eos_token_id)]


@pytest.mark.parametrize("text", ["a photo of qwe dog", "It's 2024!! naïve café — ünï", "  two   spaces\n", "a" * 300])
def test_the_full_tokenizer_is_that_of_open_clip(text: str) -> None:
    ours = clip_tokenizer()(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    theirs = open_clip.SimpleTokenizer()([text])[0].tolist()
    end = ours.index(49407) + 1
    assert ours[:end] == theirs[:end]


def test_an_invalid_base_is_one_error_that_lists_valid_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    for name, message in (
        ("nope", r"'nope' does not exist\. Ways to name a base: 'tiny'"),
        (str(tmp_path / "empty"), r"no model_index\.json"),
        (
            str(tmp_path / "other"),
            r"is a KandinskyPipeline; .* StableDiffusionPipeline \(Stable Diffusion v1 ",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_base(name)
        with pytest.raises(UserError, match=message):
            load_base(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"_class_name": "Stable', r"base_model: .*model_index\.json: not JSON: Unterminated string"),
        (b"[1, 2]", r"model_index\.json: expected a JSON object, got \[1, 2\]"),
        ('{"_class_name": "é"}'.encode("utf-16"), r"base_model: .*model_index\.json: UTF-16 text"),
    ],
)
def test_a_malformed_index_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model_index.json").write_bytes(content)
    for load in (check_base, load_base):
        with pytest.raises(UserError, match=message) as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda name: f"other.{name}", None], ids=["other names", "one is missing"])
def test_a_text_encoder_that_lacks_weights_is_refused(tmp_path: Path, change: Callable[[str], str] | None) -> None:
    """transformers would give it random ones, with a warning."""
    load_base("tiny").pipeline().save_pretrained(tmp_path / "base")
    path = tmp_path / "base/text_encoder/model.safetensors"
    tensors = load_file(path)
    if change is None:
        del tensors[max(tensors)]
    kept = {change(name) if change else name: tensor for name, tensor in tensors.items()}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"base: its text encoder lacks [0-9]+ tensors, such as .*, or they have names",
    ):
        load_base(str(tmp_path / "base"))


def test_a_hub_name_without_a_network_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load 'nobody/nothing': .*Ways to name a base"):
        load_base("nobody/nothing")


def test_a_small_change_alters_the_fingerprint() -> None:
    unet = load_base("tiny").unet
    before = fingerprint(unet)
    with torch.no_grad():
        next(unet.parameters()).mul_(1.001)
    assert fingerprint(unet) != before


def test_resolutions_must_be_multiples() -> None:
    base = load_base("tiny")
    check_resolution(64, base, "x")
    with pytest.raises(UserError, match="x: 60 is not a multiple of 16 pixels; try 48 or 64"):
        check_resolution(60, base, "x")


def test_plain_diffusers_runs_the_lines_on_the_card_of_the_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    root = WEIGHTS.parents[2]
    monkeypatch.chdir(root)  # the folder that the card's path starts from
    code = (WEIGHTS / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("guidance_scale=6", "guidance_scale=6, num_inference_steps=1"), scope)
    assert {part.dtype for part in (scope["pipeline"].unet, scope["pipeline"].text_encoder)} == {torch.float32}
    assert PIPELINE.split("```python\n")[1] in (WEIGHTS / "README.md").read_text(encoding="utf-8")

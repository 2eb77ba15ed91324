"""Stable Diffusion v1 in one file: the published names both ways, diffusers' own conversion as oracle, refusals."""

from __future__ import annotations

import argparse
import csv
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import check_base, load_base
from ether_diffusion.models.families.stable_diffusion_v1 import CONFIGS, SCHEDULER, clip_tokenizer
from ether_diffusion.models.original_layout import original_names, original_shape
from ether_diffusion.models.single_file import (
    WeightsFile,
    check_single_file,
    load_single_file,
    load_vae_file,
    open_weights,
)
from ether_diffusion.models.vaes import load_vae

NARROW: dict[str, dict[str, Any]] = {
    "unet": {**CONFIGS["unet"], "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "sample_size": 8},
    "vae": {**CONFIGS["vae"], "block_out_channels": [32, 32, 32, 64], "sample_size": 64},
    "text_encoder": {
        **CONFIGS["text_encoder"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
"""Stable Diffusion v1's layout with narrow layers."""
CLIP = "cond_stage_model.transformer.text_model."


def in_original_layout(parts: Mapping[str, nn.Module], configs: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The weights of parts, written back by the key map."""
    found = {}
    for part, module in parts.items():
        weights = module.state_dict()
        for key, name in original_names(part, weights, configs[part]).items():
            assert name not in found
            found[name] = weights[key].reshape(original_shape(name, tuple(weights[key].shape)))
    return found


@pytest.fixture(scope="module")
def narrow() -> StableDiffusionPipeline:
    torch.manual_seed(3)
    parts: Any = {
        "unet": UNet2DConditionModel(**NARROW["unet"]).eval(),
        "vae": AutoencoderKL(**NARROW["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**NARROW["text_encoder"])).eval(),
        "tokenizer": clip_tokenizer(),
        "scheduler": PNDMScheduler(**SCHEDULER),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**parts)


@pytest.fixture(scope="module")
def state(narrow: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pipeline in the original layout, with the buffers that published files carry."""
    found = in_original_layout({part: getattr(narrow, part) for part in NARROW}, NARROW)
    buffers = {
        f"{CLIP}embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.rand(1000),
        "sqrt_recipm1_alphas_cumprod": torch.rand(1000),
        "model_ema.diffusion_modeltime_embed0weight": torch.rand(4),
        "model_ema.num_updates": torch.tensor(7),
    }
    return {key: value.clone().contiguous() for key, value in (found | buffers).items()}


def written(state: dict[str, Tensor], path: Path, **changes: Tensor | None) -> WeightsFile:
    merged = {key: value for key, value in {**state, **changes}.items() if value is not None}
    save_file(merged, path)
    return open_weights(path, "base_model")


def sample(pipeline: StableDiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output: Any = pipeline("a qwe dog", num_inference_steps=2, generator=generator, output_type="pt")
    return output.images


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Stable Diffusion v1's published file."""
    with (shared / "formats/stable_diffusion_v1_single_file.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["key"]: tuple(map(int, row["shape"].split("x"))) if row["shape"] else () for row in rows}


def is_buffer(name: str) -> bool:
    return "position_ids" in name or "." not in name


def test_every_published_name_and_shape_is_consumed(published: dict[str, tuple[int, ...]]) -> None:
    """All published weights are used; only buffers are ignored."""
    read = []

    def empty(name: str) -> Tensor:
        read.append(name)
        return torch.empty(published[name], device="meta")

    pipeline, notes = load_single_file(WeightsFile(Path("sd.safetensors"), published, empty), torch.float32)
    assert notes == ()
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 859_520_964
    assert len(read) == len(set(read)) == 686 + 248 + 196
    assert all(map(is_buffer, set(published) - set(read)))


def test_the_map_written_back_gives_every_published_name_and_shape(published: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**CONFIGS["unet"]),
            "vae": AutoencoderKL(**CONFIGS["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"])),
        }
    written = {name: tuple(value.shape) for name, value in in_original_layout(parts, CONFIGS).items()}
    assert written == {name: shape for name, shape in published.items() if not is_buffer(name)}


def test_names_agree_with_diffusers_own_conversion(narrow: StableDiffusionPipeline, state: dict[str, Tensor]) -> None:
    converted = {
        "unet": convert_ldm_unet_checkpoint(state, NARROW["unet"]),
        "vae": convert_ldm_vae_checkpoint(state, NARROW["vae"]),
    }
    for part, theirs in converted.items():
        ours = getattr(narrow, part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_file_generates_the_images_of_the_pipeline_it_was_written_from(
    narrow: StableDiffusionPipeline, state: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"sd.{form}"
    if form == "ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
        file = open_weights(path, "base_model")
    else:
        file = written(state, path)
    check_single_file(file, NARROW)
    loaded, notes = load_single_file(file, torch.float32, NARROW)
    assert notes == ()
    assert torch.equal(sample(loaded), sample(narrow))
    assert loaded.scheduler.config["prediction_type"] == "epsilon"


def test_python_objects_in_a_ckpt_are_read_only_when_allowed(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "callbacks": argparse.Namespace(a=1)}, tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=r"sd\.ckpt holds Python objects .*allow_pickle=true\."):
        open_weights(tmp_path / "sd.ckpt", "base_model")
    file = open_weights(tmp_path / "sd.ckpt", "base_model", allow_pickle=True)
    assert file.shapes.keys() == state.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_packages_that_are_not_installed_are_ignored(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """The first files of Stable Diffusion v1 hold their trainer's callbacks, by class."""
    trainer = types.ModuleType("absent_trainer")
    source = """
class Callback:
    def __init__(self):
        self.best = 1.0
class Scores(list): pass
class Table(dict): pass
class Weights(dict): pass
def build(*values): return list(values)
class ByFunction:
    def __reduce__(self): return build, (1, 2)
"""
    exec(source, trainer.__dict__)
    for name in ("Callback", "Scores", "Table", "Weights", "ByFunction", "build"):
        trainer.__dict__[name].__module__ = "absent_trainer"
    monkeypatch.setitem(sys.modules, "absent_trainer", trainer)
    there: Any = trainer
    callbacks = {there.Callback: there.Callback(), "s": there.Scores([1, 2]), "t": there.Table(a=1)}
    callbacks["f"] = there.ByFunction()
    for name, held in (("sd", state), ("within", there.Weights(state))):
        content = {"state_dict": held, "callbacks": callbacks}
        torch.save(content, tmp_path / f"{name}.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "absent_trainer")

    file = open_weights(tmp_path / "sd.ckpt", "base_model", allow_pickle=True)
    assert file.shapes.keys() == state.keys()
    assert all(torch.equal(file.read(name), value) for name, value in state.items())
    with pytest.raises(
        UserError, match=r"within\.ckpt keeps its weights in objects of .* not installed: absent_trainer\.$"
    ):
        open_weights(tmp_path / "within.ckpt", "base_model", allow_pickle=True)


class _Fails:
    def __reduce__(self):
        return int, ("no number",)


def test_an_object_that_cannot_be_built_is_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "callbacks": _Fails()}, tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=r"sd\.ckpt cannot be read: ValueError: invalid literal .*no number") as caught:
        open_weights(tmp_path / "sd.ckpt", "base_model", allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_half_precision_and_other_prefixes_are_the_same_model(
    narrow: StableDiffusionPipeline, state: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    short = {key.replace(".text_model.", "."): value for key, value in half.items() if "position_ids" not in key}
    loaded, _ = load_single_file(written(short, tmp_path / "half.safetensors"), torch.float32, NARROW)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(narrow, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key].half().float()) for key in theirs)
        assert {value.dtype for value in ours.values()} == {torch.float32}


def test_missing_extra_and_misshapen_weights_are_one_error_that_names_them(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path, time = tmp_path / "sd.safetensors", "model.diffusion_model.time_embed.0.weight"
    decoder = "first_stage_model.decoder.conv_in.weight"
    for changes, message in (
        ({time: None}, rf"lacks 1 weight, e\.g\. {time}\."),
        ({time: None, decoder: None}, rf"lacks 1 weight, e\.g\. {time}; it lacks 1 weight, e\.g\. {decoder}\."),
        ({f"{CLIP}final_layer_norm.bias": None}, r"lacks 1 weight, e\.g\. .*text_model\.final_layer_norm\.bias"),
        ({time: torch.zeros(4, 4)}, rf"{time} is \(4, 4\), not \(128, 32\)"),
        (
            {"model.diffusion_model.fuser.weight": torch.zeros(1)},
            r"its UNet has 1 weight, e\.g\. .*fuser\.weight that v1 does not have",
        ),
    ):
        file = written(state, path, **changes)
        for load in (check_single_file, lambda file, configs: load_single_file(file, torch.float32, configs)):
            with pytest.raises(UserError, match=rf"base_model: .*sd\.safetensors is not a Stable .*{message}"):
                load(file, NARROW)


def test_other_unused_weights_are_noted(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = written(state, tmp_path / "sd.safetensors", **{"cond_stage_model.logit_scale": torch.zeros(1)})
    _, notes = load_single_file(file, torch.float32, NARROW)
    assert notes == ("sd.safetensors: not used: 1 weight, e.g. cond_stage_model.logit_scale",)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conditioner.embedders.0.transformer.x.weight", (1,), "is a Stable Diffusion XL"),
        ("cond_stage_model.model.ln_final.weight", (1,), "is a Stable Diffusion v2; for v2 give a folder"),
        (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            (4, 1024),
            "is a Stable Diffusion v2",
        ),
        ("model.diffusion_model.input_blocks.0.0.weight", (4, 9, 3, 3), r"inpainting or editing \(9 input channels"),
        ("lora_unet_down_blocks_0.lora_down.weight", (1,), "is a LoRA, not a base"),
        ("down_blocks.0.resnets.0.conv1.weight", (1,), "one part of a Stable Diffusion in diffusers' layout"),
        ("something.else", (1,), "none of its 1 tensors is named model.diffusion_model"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    save_file({name: torch.zeros(math.prod(shape)).reshape(shape)}, tmp_path / "file.safetensors")
    for load in (check_base, load_base):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / "file.safetensors"))


@pytest.mark.parametrize("name", ["file.safetensors", "file.ckpt"])
def test_a_damaged_or_absent_file_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check_base(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_base(str(tmp_path / name))


def test_a_vae_alone_or_in_a_whole_file(
    narrow: StableDiffusionPipeline, state: dict[str, Tensor], tmp_path: Path
) -> None:
    prefix = "first_stage_model."
    alone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    for name, tensors in (("vae", alone), ("whole", state)):
        loaded = load_vae_file(written(tensors, tmp_path / f"{name}.safetensors"), torch.float32, NARROW["vae"])
        theirs = narrow.vae.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(UserError, match=r"vae: .*vae\.safetensors is not a VAE .*\(32, 3, 3, 3\), not \(128"):
        load_vae(str(tmp_path / "vae.safetensors"))
    # A file without a VAE serves where another VAE takes its place.
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    pipeline, _ = load_single_file(written(rest, tmp_path / "rest.safetensors"), torch.float32, NARROW, vae=False)
    assert pipeline.vae is None

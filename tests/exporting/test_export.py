"""Exported adapters: plain diffusers makes the images that we make; of the slow tests, in a process without us."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler
from load_elsewhere import image, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import ether_diffusion
from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.foreign_lora import read_lora
from ether_diffusion.errors import UserError
from ether_diffusion.exporting import Exported, export_run
from ether_diffusion.exporting.lora_files import tensor_bytes
from ether_diffusion.exporting.original_file import original_tensors
from ether_diffusion.generation import load_pipeline
from ether_diffusion.models.bases import fingerprint, load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.families.stable_diffusion_v1 import SCHEDULER, TEXT_ENCODER, VAE, build_unet
from support.adapted_unets import move, settings_of
from support.narrow_base import narrow_base

CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|conv|time_emb_proj)|conv_in|conv_out|time_embedding\.linear_."
ADAPTERS: dict[str, dict[str, Any]] = {
    "ether": {"method": "ether"},
    "ether, both sides, four blocks": {"method": "ether", "sides": "both", "num_blocks": 4},
    "ether_plus, one side": {"method": "ether_plus", "sides": "in", "target": "all"},
    "ether_plus, text": {"method": "ether_plus", "text_encoder": True, "num_blocks": 2},
    "ether_plus, convolutions": {"method": "ether_plus", "target": CONVOLUTIONS, "text_encoder": True},
    "lora": {"method": "lora"},
    "hra": {"method": "hra"},
}
FULL_RANK = {"oft": {"method": "oft"}, "naive": {"method": "naive"}}
LORA_FORMATS = ("kohya", "diffusers", "peft")
TOGETHER = "together"
IN_THE_FAST_SUITE = ("ether_plus, convolutions", "oft", TOGETHER)
TOLERANCE = {"fp32": 2e-5, "fp16": 5e-4}


Images = dict[Any, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in diffusers' layout, on the disk."""
    folder = tmp_path_factory.mktemp("base")
    narrow_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Saved adapters that are away from where they start, each made when it is asked for; and several of them."""
    root = tmp_path_factory.mktemp("adapters")

    class Adapters(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            if name == TOGETHER:
                file = _third_party_lora(root / "other.safetensors")
                names = "ether_plus, convolutions", "ether, both sides, four blocks"
                self[name] = [*((self[one], s) for one, s in zip(names, (0.8, -0.5), strict=True)), (file, 0.6)]
            else:
                self[name] = _save(base, root / f"adapter_{len(self)}", **{**ADAPTERS, **FULL_RANK}[name])
            return self[name]

    return Adapters()


def _third_party_lora(path: Path) -> Path:
    """As kohya's scripts write it: in fp16, alpha half the rank, on attention, a convolution and the text encoder."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    layers = {attention: (32,), "lora_unet_down_blocks_0_resnets_0_conv1": (32, 3, 3)}
    layers["lora_te_text_model_encoder_layers_0_self_attn_q_proj"] = (32,)
    for layer, into in layers.items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, *into, generator=generator).half()
        up = torch.randn(32, 4, *[1] * (len(into) - 1), generator=generator)
        tensors[f"{layer}.lora_up.weight"] = (0.03 * up).half()
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def _save(base: Path, folder: Path, **settings: Any) -> Path:
    parts, chosen = load_base(str(base)), settings_of(settings.pop("method"), **settings)
    attach(parts.unet, chosen)
    move(parts.unet, 0.1)
    text = None
    if chosen.text_encoder:
        text = parts.text_encoder
        attach(text, chosen.for_text_encoder())
        move(text, 0.1)
    return ether_diffusion.save_adapter(parts.unet, folder, base_model=str(base), text_encoder=text)


@pytest.fixture(scope="module")
def few_images(base: Path, adapters: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Of the adapters in the fast suite: kohya's file in fp16, the others in fp32."""
    root = tmp_path_factory.mktemp("few")
    jobs = _exported(base, adapters, IN_THE_FAST_SUITE, root, dtypes={"kohya": ["fp16"]})
    return {key: image(load(str(base), *job)) for key, job in jobs.items()}


@pytest.fixture(scope="module")
def images(base: Path, adapters: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Of all adapters, in a process that refuses this package."""
    names, both, root = [*ADAPTERS, *FULL_RANK, TOGETHER], ["fp32", "fp16"], tmp_path_factory.mktemp("all")
    jobs = _exported(base, adapters, names, root, dtypes=dict.fromkeys(LORA_FORMATS, both))
    targets = {key: root / f"{k}.npy" for k, key in enumerate(jobs)}
    listed = json.dumps([[*job, str(targets[key])] for key, job in jobs.items()])
    script = Path(__file__).with_name("load_elsewhere.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(script), str(base), listed]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {key: np.load(target) for key, target in targets.items()}


def _exported(
    base: Path, adapters: Mapping[str, Any], names: Sequence[str], root: Path, dtypes: Mapping[str, Sequence[str]]
) -> dict[Any, tuple[str, str]]:
    """By adapter, format and dtype: the kind and the path of the export. `base`: without one."""
    jobs: dict[Any, tuple[str, str]] = {"base": ("base", "")}
    for k, name in enumerate(names):
        adapter = adapters[name]
        for format in () if name in FULL_RANK else LORA_FORMATS:
            for dtype in dtypes.get(format, ["fp32"]):
                output = root / f"{k}_{format}_{dtype}{'.safetensors' if format == 'kohya' else ''}"
                ether_diffusion.export(adapter, format, output, dtype=dtype)
                jobs[name, format, dtype] = ("peft" if format == "peft" else "lora", str(output))
        for kind, output in (("folder", root / f"{k}_merged"), ("file", root / f"{k}_merged.safetensors")):
            ether_diffusion.export(adapter, "merged", output, dtype="fp32")
            jobs[name, kind, "fp32"] = (kind, str(output))
    return jobs


@pytest.mark.parametrize("name", IN_THE_FAST_SUITE)
def test_plain_diffusers_makes_the_same_image(name: str, adapters: Mapping[str, Any], few_images: Images) -> None:
    assert _compare(name, adapters[name], few_images) == (2 if name in FULL_RANK else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ADAPTERS, *FULL_RANK, TOGETHER])
def test_plain_diffusers_makes_the_same_image_with_every_adapter(
    name: str, adapters: Mapping[str, Any], images: Images
) -> None:
    assert _compare(name, adapters[name], images) == (2 if name in FULL_RANK else 8)


def _compare(name: str, adapter: Any, images: Images) -> int:
    """Compare all images of an adapter with ours. Returns their number."""
    pipeline, _ = load_pipeline(adapter, device="cpu", dtype="fp32")
    ours = image(pipeline)
    assert np.abs(ours - images["base"]).max() > 0.02, "the adapter must change the image, or nothing is compared"
    found = {key: images[key] for key in images if key[0] == name}
    for (_, format, dtype), theirs in found.items():
        assert np.abs(theirs - ours).max() <= TOLERANCE[dtype] * np.ptp(ours), (format, dtype)
    return len(found)


def test_merged_equals_merging_bit_for_bit(base: Path, adapters: Mapping[str, Any], tmp_path: Path) -> None:
    adapter = adapters["ether_plus, convolutions"]
    ether_diffusion.export(adapter, "merged", tmp_path / "merged", dtype="fp32")
    unet = load_base(str(base)).unet
    ether_diffusion.load_adapter(unet, adapter)
    merge(unet)
    written = load_base(str(tmp_path / "merged")).unet.state_dict()
    assert all(torch.equal(written[key], weight) for key, weight in unet.state_dict().items())


def test_several_add_up_in_any_order(base: Path, adapters: Mapping[str, Any], tmp_path: Path) -> None:
    """Equal bytes in every order, and of the changes of the files of each alone; `merged` has the same weights."""
    parts = adapters[TOGETHER]
    for name, order in (("one", parts), ("two", parts[::-1])):
        done = ether_diffusion.export(order, "kohya", tmp_path / f"{name}.safetensors", dtype="fp32")
        ether_diffusion.export(order, "merged", tmp_path / f"{name}_merged", dtype="fp32")
        assert done.error < 1e-6
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["ether_diffusion.weight_changes"])
    assert sorted(one["strength"] for one in recorded) == [-0.5, 0.6, 0.8]
    unets = [load_base(str(tmp_path / f"{name}_merged")).unet.state_dict() for name in ("one", "two")]
    assert all(torch.equal(tensor, unets[1][key]) for key, tensor in unets[0].items())
    wanted = {key: tensor.double() for key, tensor in load_base(str(base)).unet.state_dict().items()}
    for path, strength in parts:
        if path.is_dir():
            ether_diffusion.export(path, "kohya", alone := tmp_path / f"{path.name}.safetensors", dtype="fp32")
            path = alone
        for layer, change in read_lora(path).changes_of(load_base(str(base)).unet, "unet").items():
            wanted[f"{layer}.weight"] += strength * change.dense().double()
    together = read_lora(tmp_path / "one.safetensors").changes_of(load_base(str(base)).unet, "unet")
    for key, weight in load_base(str(base)).unet.state_dict().items():
        change = together.get(key.removesuffix(".weight"))
        torch.testing.assert_close(unets[0][key].double(), wanted[key], rtol=0, atol=2e-6)
        if change is not None:
            torch.testing.assert_close((weight + change.dense()).double(), wanted[key], rtol=0, atol=2e-6)


def test_what_cancels_is_the_base(adapters: Mapping[str, Any], tmp_path: Path) -> None:
    adapter = adapters["ether"]
    done = ether_diffusion.export([(adapter, 1.0), (adapter, -1.0)], "kohya", tmp_path / "none.safetensors")
    assert done.strength < 1e-6
    assert ether_diffusion.export([(adapter, 1.0), (adapter, -0.9)], "kohya", tmp_path / "x.safetensors").ranks == (2,)


def test_strength_is_folded_in(base: Path, adapters: Mapping[str, Any], tmp_path: Path) -> None:
    adapter = adapters["ether_plus, one side"]
    done: Exported = ether_diffusion.export(adapter, "kohya", tmp_path / "half.safetensors", dtype="fp32", scale=0.5)
    whole: Exported = ether_diffusion.export(adapter, "kohya", tmp_path / "whole.safetensors", dtype="fp32")
    assert done.strength == pytest.approx(whole.strength / 2, rel=1e-4)
    assert done.ranks == whole.ranks == (2,)
    assert done.layers == len(load_file(tmp_path / "half.safetensors")) / 3


def test_truncation_states_its_error(adapters: Mapping[str, Any], tmp_path: Path) -> None:
    adapter = adapters["ether, both sides, four blocks"]
    errors = {}
    for rank in (1, 4, 8):
        done = ether_diffusion.export(adapter, "kohya", tmp_path / f"{rank}.safetensors", dtype="fp32", max_rank=rank)
        assert done.ranks == (rank,)
        errors[rank] = done.error
    assert errors[8] < 1e-5 < errors[4] < errors[1] < 1


def test_other_programs_find_what_they_show(adapters: Mapping[str, Any], base: Path, tmp_path: Path) -> None:
    output = tmp_path / "my_dog.safetensors"
    ether_diffusion.export(adapters["ether_plus, text"], "kohya", output)
    with safe_open(output, "pt") as file:
        facts, keys = file.metadata(), set(file.keys())
    assert facts["ss_base_model_version"] == "sd_v1"
    assert (facts["ss_network_module"], facts["ss_network_dim"], facts["ss_network_alpha"]) == (
        "networks.lora",
        "8",
        "8",
    )
    assert facts["ss_output_name"] == "my_dog"
    assert facts["ether_diffusion.base"] == str(base)
    assert facts["ether_diffusion.base_digest"] == fingerprint(load_base(str(base)).unet)
    layers = {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")}
    assert keys == {f"{layer}.{end}" for layer in layers for end in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert "lora_te_text_model_encoder_layers_1_self_attn_out_proj" in layers
    assert "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_out_0" in layers
    assert len(layers) == 8 * 4 + 8


def test_equal_exports_are_equal_files(adapters: Mapping[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        ether_diffusion.export(adapters["ether"], "diffusers", tmp_path / name)
    files = [(tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    facts = {str(k): str(k) for k in range(20)}
    assert len({tensor_bytes({"a": torch.zeros(3)}, facts) for _ in range(8)}) == 1


def test_a_single_file_has_the_published_keys_and_shapes(shared: Path) -> None:
    """Of the full-size model, on meta tensors: names and shapes alone."""
    with torch.device("meta"):
        parts = {
            "unet": build_unet(),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        }
    tensors = original_tensors(SimpleNamespace(**parts, scheduler=PNDMScheduler(**SCHEDULER)), torch.float32)
    with (shared / "formats/stable_diffusion_v1_single_file.csv").open() as file:
        published = {row["key"]: (row["dtype"], row["shape"]) for row in csv.DictReader(file)}
    found = {
        key: (str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)))
        for key, tensor in tensors.items()
    }
    assert found == published


def test_the_schedule_in_a_single_file_is_diffusers_own() -> None:
    tensors, theirs = (
        original_tensors(narrow_base(), torch.float16),
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )
    torch.testing.assert_close(tensors["alphas_cumprod"], theirs.alphas_cumprod, rtol=1e-5, atol=0)
    for step in (1, 500, 999):
        variance = theirs._get_variance(step)
        torch.testing.assert_close(tensors["posterior_variance"][step], variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lycoris", "output": "x.safetensors"}, "--format lycoris: expected one of kohya, diffusers"),
        ({"output": "folder"}, "--output folder: expected a file that ends in .safetensors"),
        ({"format": "peft", "output": "x.safetensors"}, "--output x.safetensors: expected a folder"),
        ({"output": "x.safetensors", "dtype": "int8"}, "--dtype int8: expected one of fp32, fp16, bf16"),
        ({"output": "x.safetensors", "max_rank": 0}, "--max-rank 0: expected a number from 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, adapters: Mapping[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        ether_diffusion.export(adapters["ether"], **options)
    assert message in str(caught.value)


def test_nothing_is_overwritten(adapters: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        ether_diffusion.export(adapters["ether"], "kohya", tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="not empty"):
        ether_diffusion.export(adapters["ether"], "diffusers", tmp_path)
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_a_condition_encoder_is_not_written_over_what_is_there(
    adapters: Mapping[str, Path], base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapters["ether"], run / "adapter")
    build_condition_encoder(load_base(str(base)).unet, 2).save_pretrained(run / "condition_encoder")
    (tmp_path / "lora_condition_encoder").mkdir()
    (tmp_path / "lora_condition_encoder/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="lora_condition_encoder is not empty"):
        ether_diffusion.export(run, "kohya", tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
    done: Exported = ether_diffusion.export(run, "kohya", tmp_path / "other.safetensors")
    assert [file.name for file in done.files] == ["other.safetensors", "other_condition_encoder"]


class FailingDisk:
    """Of a safetensors file: another last weight of the UNet than was written."""

    def __init__(self, *words: Any) -> None:
        self.file = safe_open(*words)

    def __enter__(self) -> FailingDisk:
        self.found = self.file.__enter__()
        return self

    def __exit__(self, *words: Any) -> None:
        self.file.__exit__(*words)

    def keys(self) -> list[str]:
        return self.found.keys()

    def get_tensor(self, key: str) -> torch.Tensor:
        tensor = self.found.get_tensor(key)
        return tensor + 1e-3 if key.endswith(("conv_out.weight", "out.2.weight")) else tensor


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_merged_model_is_read_back(
    name: str, adapters: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_run, "safe_open", FailingDisk)
    with pytest.raises(OSError, match="that was read back is not what was written"):
        ether_diffusion.export(adapters["ether"], "merged", tmp_path / name, dtype="fp32")
    assert not any(tmp_path.iterdir())


def test_a_method_of_full_rank_is_offered_merging(adapters: Mapping[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full rank"):
        ether_diffusion.export(adapters["oft"], "kohya", tmp_path / "oft.safetensors")
    assert not any(tmp_path.iterdir())

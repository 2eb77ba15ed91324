"""LoRA files of other programs: every layout gives the changes that diffusers gives; what is wrong is one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ether_diffusion.adapters.foreign_lora import kohya_key, read_lora
from ether_diffusion.errors import UserError
from ether_diffusion.files import digest_of_file
from support.narrow_base import narrow_base

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0."
LAYERS = {
    ("unet", f"{ATTENTION}attn2.to_k"): (32, 32),
    ("unet", f"{ATTENTION}attn1.to_out.0"): (32, 32),
    ("unet", "down_blocks.0.attentions.0.proj_in"): (32, 32, 1, 1),
    ("unet", "down_blocks.0.resnets.0.conv1"): (32, 32, 3, 3),
    ("text_encoder", "encoder.layers.1.self_attn.out_proj"): (32, 32),
}
RANK, ALPHA = 4, 6.0

Factors = Mapping[tuple[str, str], tuple[Tensor, Tensor]]


@pytest.fixture
def factors() -> Factors:
    """(up, down) of each layer, in LoRA's shapes and in half precision."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for key, shape in LAYERS.items():
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
        found[key] = (0.1 * up).half(), torch.randn(RANK, *shape[1:], generator=generator).half()
    return found


def kohya(factors: Factors, prefix: str = "lora_te_") -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for (part, layer), (up, down) in factors.items():
        key = kohya_key(part, layer).replace("lora_te_", prefix)
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"] = up, down
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors, {"ss_network_module": "networks.lora"}


def recent(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers saves: PEFT's keys, and its settings in the metadata. One layer has an alpha of its own."""
    tensors, settings = {}, {}
    for (part, layer), (up, down) in factors.items():
        own = layer == f"{ATTENTION}attn2.to_k"
        tensors[f"{part}.{layer}.lora_B.weight"] = (up * (ALPHA / 2 if own else 1)).half()
        tensors[f"{part}.{layer}.lora_A.weight"] = down
        targets = [name for own_part, name in factors if own_part == part]
        common = {
            "target_modules": targets,
            "r": RANK,
            "lora_alpha": ALPHA,
            "alpha_pattern": {"attn2.to_k": 2.0} if part == "unet" else {},
        }
        settings |= {f"{part}.{key}": value for key, value in common.items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def old(factors: Factors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As diffusers saved in 2023, without alpha: it is in the factors."""
    tensors = {}
    for (part, layer), (up, down) in factors.items():
        name = re.sub(r"(attn\d)\.to_(\w+?)(\.0)?$", r"\1.processor.to_\2_lora", layer)
        name = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1_lora", name)
        name += "" if name.endswith("_lora") else ".lora"
        tensors[f"{part}.{name}.up.weight"] = (up * ALPHA / RANK).half()
        tensors[f"{part}.{name}.down.weight"] = down
    return tensors, {}


LAYOUTS: dict[str, Callable[[Factors], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "kohya": kohya,
    "kohya, te1": lambda factors: kohya(factors, "lora_te1_"),
    "diffusers": recent,
    "diffusers, 2023": old,
}


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, facts)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_changes(layout: str, factors: Factors, tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "x.safetensors", *LAYOUTS[layout](factors)))
    assert lora.digest == digest_of_file(tmp_path / "x.safetensors")
    base: Any = narrow_base()
    models = {"unet": base.unet, "text_encoder": base.text_encoder}
    lora.check_fits(models)
    found = {part: lora.changes_of(model, part) for part, model in models.items()}
    assert {(part, re.sub("^text_model.", "", layer)) for part in found for layer in found[part]} == {*factors}
    for part, layers in found.items():
        for layer, change in layers.items():
            up, down = factors[part, re.sub("^text_model.", "", layer)]
            wanted = ALPHA / RANK * torch.tensordot(up.float().flatten(1), down.float(), dims=1)
            torch.testing.assert_close(change.dense(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_the_changes_are_those_that_diffusers_fuses(layout: str, factors: Factors, tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "x.safetensors", *LAYOUTS[layout](factors)))
    base: Any = narrow_base()
    parts = ("unet", "text_encoder")
    before = {part: getattr(base, part).state_dict() for part in parts}
    before = {part: {key: value.clone() for key, value in state.items()} for part, state in before.items()}
    changes = {part: lora.changes_of(getattr(base, part), part) for part in parts}
    base.load_lora_weights(tmp_path / "x.safetensors")
    base.fuse_lora()
    base.unload_lora_weights()
    for part in parts:
        for key, weight in getattr(base, part).state_dict().items():
            change = changes[part].get(key.removesuffix(".weight"))
            wanted = before[part][key] + (change.dense() if change is not None else 0)
            torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)


def test_a_tucker_core_is_multiplied_in(tmp_path: Path) -> None:
    """LyCORIS's LoCon: 1 x 1, then the kernel, then 1 x 1, one after the other as convolutions."""
    key, (down, mid, up) = (
        kohya_key("unet", "conv1"),
        (torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)),
    )
    tensors = {"down": down, "mid": mid, "up": up}
    save_file({f"{key}.lora_{role}.weight": tensor for role, tensor in tensors.items()}, tmp_path / "x.safetensors")
    model = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(5, 7, 3, bias=False)})
    change = read_lora(tmp_path / "x.safetensors").changes_of(model, "unet")["conv1"]
    x = torch.randn(2, 5, 8, 8)
    wanted = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    torch.testing.assert_close(torch.conv2d(x, change.dense()), wanted, rtol=1e-4, atol=1e-4)


def _without(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    first = min(key for key in tensors if key.endswith(end))
    return {key: value for key, value in tensors.items() if key != first}


def _replaced(tensors: dict[str, Tensor], end: str, value: Tensor) -> dict[str, Tensor]:
    first = min(key for key in tensors if key.endswith(end))
    return {**tensors, first: value}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no up": (lambda t: _without(t, "up.weight"), "has no up factor"),
    "no down": (lambda t: _without(t, "down.weight"), "has no down factor"),
    "other ranks": (lambda t: _replaced(t, "up.weight", torch.zeros(32, 3, 1, 1)), "do not fit each other: down (4, "),
    "rank 0": (lambda t: _replaced(_replaced(t, "up.weight", torch.zeros(9, 0)), "down.weight", torch.zeros(0, 9)),
               "do not fit each other"),
    "flat": (lambda t: _replaced(t, "up.weight", torch.zeros(32)), "do not fit each other"),
    "two alphas": (lambda t: _replaced(t, "alpha", torch.ones(2)), "has shape (2,); expected one number"),
    "alpha nan": (lambda t: _replaced(t, "alpha", torch.tensor(math.nan)), "holds NaN or infinity"),
    "infinity": (lambda t: _replaced(t, "up.weight", torch.full((32, 4, 1, 1), math.inf)), "holds NaN or infinity"),
    "integers": (lambda t: _replaced(t, "up.weight", torch.ones(32, 4, dtype=torch.int8)), "expected floating numbers"),
    "more": (lambda t: {**t, "lora_unet_mid.diff_b": torch.zeros(3)}, "1 of its 16 tensors are not a LoRA's"),
    "dora": (lambda t: {**t, "lora_unet_mid.dora_scale": torch.zeros(3)}, "holds DoRA, not a LoRA"),
    "lokr": (lambda t: {"lora_unet_mid.lokr_w1": torch.zeros(3)}, "holds LoKr, not a LoRA"),
    "ours": (lambda t: {"base_model.model.mid.ether_in.u": torch.zeros(3)}, "holds ETHER or ETHER+, not a LoRA"),
    "a model": (lambda t: {"conv_in.weight": torch.zeros(3)}, "1 of its 1 tensors are not a LoRA's, e.g. conv_in"),
    "twice": (lambda t: {**t, **kohya_as_peft(t)}, "two sets of keys name one layer"),
}  # fmt: skip


def kohya_as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    up, down = (
        next(t for key, t in tensors.items() if key.endswith(f"proj_in.lora_{role}.weight")) for role in ("up", "down")
    )
    layer = "unet.down_blocks.0.attentions.0.proj_in"
    return {f"{layer}.lora_A.weight": down.clone(), f"{layer}.lora_B.weight": up.clone()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_one_line(fault: str, factors: Factors, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    tensors, facts = kohya(factors)
    path = write(tmp_path / "x.safetensors", spoil(tensors), facts)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_lora(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [("no JSON", "is not JSON"), ("[]", "is not JSON"), ('{"unet.lora_alpha": "x"}', "expected a number"),
     ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "alpha_pattern is no object"),
     ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 3}}', "alpha_pattern: ")],
)  # fmt: skip
def test_malformed_metadata_is_one_line(settings: str, message: str, factors: Factors, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", recent(factors)[0], {"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_lora(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_no_safetensors_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, message in (("text.safetensors", "not a LoRA"), ("no.safetensors", "not found"), ("empty", "no single")):
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path / name)


def test_layers_that_the_base_lacks_are_named(factors: Factors, tmp_path: Path) -> None:
    tensors, _ = kohya(factors)
    models = {"unet": narrow_base().unet}
    lora = read_lora(write(tmp_path / "x.safetensors", tensors, {}))
    with pytest.raises(
        UserError, match=r"has only 4 of its 5 layers; not, e\.g\., lora_te_text_model_encoder_layers_1"
    ):
        lora.check_fits(models)
    others = {key.replace("down_blocks_0", "input_blocks_9"): t for key, t in tensors.items() if "unet" in key}
    lora = read_lora(write(tmp_path / "y.safetensors", others, {}))
    with pytest.raises(UserError, match="has none of its 4 layers"):
        lora.check_fits(models)
    wide = {key: torch.zeros(t.shape[0] * 2, *t.shape[1:]) if "up.w" in key else t for key, t in tensors.items()}
    with pytest.raises(UserError, match=r"does not fit this base: it changes a weight \(64, 32"):
        read_lora(write(tmp_path / "z.safetensors", wide, {})).changes_of(models["unet"], "unet")

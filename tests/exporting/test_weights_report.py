"""What `inspect` says of files of any program: ours, and keys as other programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.foreign_lora import find_weights
from ether_diffusion.adapters.low_rank import low_rank_changes
from ether_diffusion.errors import UserError
from ether_diffusion.exporting.lora_files import write_diffusers, write_kohya, write_peft
from ether_diffusion.exporting.weights_report import describe_weights, strengths, strengths_of_adapter
from support.adapted_unets import move, saved_as, settings_of
from support.unets import one_block_unet


def _file(path: Path, *keys: str, shape: tuple[int, ...] = (4, 8)) -> Path:
    save_file({key: torch.zeros(shape) for key in keys}, path)
    return path


@pytest.mark.parametrize(
    ("keys", "method", "layout"),
    [
        (("lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight"), "LoRA", "kohya"),
        (("lora_unet_mid.lora_down.weight", "lora_unet_mid.dora_scale"), "DoRA", "kohya"),
        (("lora_unet_mid.lokr_w1", "lora_unet_mid.lokr_w2"), "LoKr", "kohya"),
        (("lora_unet_mid.hada_w1_a",), "LoHa", "kohya"),
        (("lora_te1_text_model_x.oft_blocks",), "OFT", "kohya"),
        (("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",), "LoRA", "diffusers"),
        (("base_model.model.mid.to_q.ether_in.u",), "ETHER or ETHER+", "PEFT"),
    ],
)
def test_methods_are_known_by_their_keys(keys: tuple[str, ...], method: str, layout: str, tmp_path: Path) -> None:
    rows = describe_weights(_file(tmp_path / "x.safetensors", *keys))
    assert (rows["method"], rows["keys"]) == (method, layout)


@pytest.mark.parametrize(
    ("key", "width", "base"),
    [
        ("lora_unet_x_attn2_to_k.lora_down.weight", 768, "Stable Diffusion v1"),
        ("unet.x.attn2.to_v.lora_A.weight", 1024, "Stable Diffusion v2"),
        ("model.diffusion_model.x.attn2.to_k.weight", 2048, "Stable Diffusion XL"),
        ("unet.x.attn2.to_v.lora_A.weight", 24, "cross-attention to text of width 24"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 768, "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", 768, "a diffusion transformer"),
    ],
)
def test_bases_are_known_by_their_shapes(key: str, width: int, base: str, tmp_path: Path) -> None:
    up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
    save_file({up: torch.zeros(640, 4), key: torch.zeros(4, width)}, tmp_path / "x.safetensors")
    assert describe_weights(tmp_path / "x.safetensors")["base architecture"] == base


def test_strength_is_the_norm_of_the_change_over_the_weights(tmp_path: Path) -> None:
    unet, settings = one_block_unet(), settings_of("ether_plus")
    attach(unet, settings)
    move(unet)
    ours = strengths_of_adapter(unet).layers
    changes = {"unet": low_rank_changes(unet, saved_as(settings))}
    write_kohya(tmp_path / "kohya.safetensors", changes, torch.float32, {})
    write_diffusers(tmp_path / "diffusers", changes, torch.float32, {})
    write_peft(tmp_path / "peft", changes, torch.float32, "base")
    for path in (tmp_path / "kohya.safetensors", tmp_path / "diffusers", tmp_path / "peft"):
        file = find_weights(path)
        assert file is not None
        theirs = strengths(file, one_block_unet()).layers
        assert theirs == pytest.approx(ours, rel=1e-4)
        assert describe_weights(file)["rank"] == "4"
    assert "middle" in strengths(tmp_path / "kohya.safetensors", one_block_unet()).rows["strength"]


def test_alphas_on_some_layers_only_are_named(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {f"lora_unet_{x}.lora_down.weight": torch.zeros(2, 4) for x in "ab"}
    tensors["lora_unet_a.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "x.safetensors")
    assert describe_weights(tmp_path / "x.safetensors")["alpha"].startswith("on 1 layers only")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"x\.safetensors: not a safetensors file"):
        describe_weights(tmp_path / "x.safetensors")
    assert find_weights(tmp_path / "nothing") is None

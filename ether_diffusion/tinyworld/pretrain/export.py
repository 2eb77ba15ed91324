"""Trained networks in the shipped layout: diffusers' and transformers' own folders, fp16 safetensors."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPTokenizer

from ether_diffusion.files import digest_of_file, whole_folder
from ether_diffusion.tinyworld.scenes import SIZE

from .denoiser import assemble

MAKING = "making.json"


def export(networks: dict[str, nn.Module], tokenizer: CLIPTokenizer, folder: Path, making: dict[str, Any]) -> Path:
    """Write `pipeline/`, `clip/`, `backbone/`, `segmenter/` and `making.json` with the digest of every file.

    Args:
        networks: By stage, with their final weights; they stay in fp32. Without `denoiser`, `pipeline/` has no UNet.
        making: The record of their training, for `making.json`.
    """
    parts: dict[str, Any] = {name: deepcopy(network).half().cpu() for name, network in networks.items()}
    text_encoder = deepcopy(parts["clip"].text_model)
    processor = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with whole_folder(folder) as partial:
        pipeline = partial / "pipeline"
        if "denoiser" in parts:
            assemble(parts["autoencoder"], text_encoder, tokenizer, parts["denoiser"]).save_pretrained(pipeline)
        else:
            parts["autoencoder"].save_pretrained(pipeline / "vae")
            text_encoder.save_pretrained(pipeline / "text_encoder")
            tokenizer.save_pretrained(pipeline / "tokenizer")
        for name in ("clip", "backbone", "segmenter"):
            parts[name].save_pretrained(partial / name)
            processor.save_pretrained(partial / name)
        tokenizer.save_pretrained(partial / "clip")
        making = {**making, "torch": torch.__version__.split("+")[0], "sha256": digests(partial)}
        (partial / MAKING).write_text(json.dumps(making, indent=1) + "\n", encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but `making.json` and the card, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MAKING, "README.md")]
    return {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}

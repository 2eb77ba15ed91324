"""Trained networks in the layout that is shipped: diffusers' and transformers' own folders, fp16 safetensors."""

from __future__ import annotations

import hashlib
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPTokenizer

from ether_diffusion.tinyworld.scenes import SIZE

from .denoiser import assemble

MAKING = "making.json"


def export(networks: dict[str, nn.Module], tokenizer: CLIPTokenizer, folder: Path, making: dict[str, Any]) -> Path:
    """Write `pipeline/`, `clip/`, `backbone/`, `segmenter/` and `making.json` with the digest of every file.

    Args:
        networks: By stage, with their final weights; left in fp32. Without `denoiser`, `pipeline/` has all but a UNet.
        making: What is recorded of how they were made.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts: dict[str, Any] = {name: deepcopy(network).half().cpu() for name, network in networks.items()}
    text_encoder = deepcopy(parts["clip"].text_model)
    if "denoiser" in parts:
        assemble(parts["autoencoder"], text_encoder, tokenizer, parts["denoiser"]).save_pretrained(partial / "pipeline")
    else:
        parts["autoencoder"].save_pretrained(partial / "pipeline/vae")
        text_encoder.save_pretrained(partial / "pipeline/text_encoder")
        tokenizer.save_pretrained(partial / "pipeline/tokenizer")
    processor = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for name in ("clip", "backbone", "segmenter"):
        parts[name].save_pretrained(partial / name)
        processor.save_pretrained(partial / name)
    tokenizer.save_pretrained(partial / "clip")
    making = {**making, "torch": torch.__version__.split("+")[0], "sha256": digests(partial)}
    (partial / MAKING).write_text(json.dumps(making, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but `making.json` and the card, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MAKING, "README.md")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

"""Loads another VAE instead of the base's own: a folder, a hub name, or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ether_diffusion.errors import UserError
from ether_diffusion.weight_files import is_hub_name, loading

from .single_file import is_single_file, load_vae_file, open_weights

_WAYS = (
    "Ways to name a VAE: a folder of an AutoencoderKL or of a pipeline in diffusers' layout; a hub name such as "
    "'stabilityai/sd-vae-ft-mse'; a .safetensors or .ckpt file in the original layout."
)


def load_vae(name: str, dtype: torch.dtype = torch.float32, *, allow_pickle: bool = False) -> AutoencoderKL:
    """Load an AutoencoderKL, on the CPU.

    Args:
        name: A folder with the config.json of an AutoencoderKL; a pipeline's folder, whose `vae/` is taken; a hub name
            of either; a single file.
        allow_pickle: As for `open_weights`.

    Raises:
        UserError: not found, offline, or not an AutoencoderKL.
    """
    if is_single_file(name):
        return load_vae_file(open_weights(name, "vae", _WAYS, allow_pickle=allow_pickle), dtype)
    check_vae_name(name)
    with loading(f"vae: cannot load {name!r}", _WAYS):
        subfolder = ""
        try:
            config: Any = AutoencoderKL.load_config(name)
        except OSError:  # no config.json there: perhaps a pipeline
            config = AutoencoderKL.load_config(name, subfolder=(subfolder := "vae"))
        if config.get("_class_name") != "AutoencoderKL":
            raise UserError(f"vae: {name} is a {config.get('_class_name')}; expected an AutoencoderKL.")
        return AutoencoderKL.from_pretrained(name, subfolder=subfolder, torch_dtype=dtype)


def check_vae_name(name: str) -> None:
    """Refuse early a path that does not exist, or a folder that holds no VAE."""
    path = Path(name)
    if path.is_dir():
        if not any((path / inner / "config.json").is_file() for inner in ("", "vae")):
            raise UserError(f"vae: {name} has no config.json, nor has its folder vae/. {_WAYS}")
    elif not path.is_file() and (is_single_file(name) or not is_hub_name(name)):
        raise UserError(f"vae: {name!r} does not exist. {_WAYS}")


def check_vae_fits(vae: AutoencoderKL, own: dict[str, Any], name: str) -> None:
    """Refuse a VAE whose latents differ in channels, size or scale from those of the base's own VAE (config `own`)."""
    facts = {
        "latent channels": lambda config: config["latent_channels"],
        "pixels per latent": lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        "scaling factor": lambda config: config["scaling_factor"],
    }
    found = {what: (fact(vae.config), fact(own)) for what, fact in facts.items()}
    wrong = [f"{what} {theirs}, expected {ours}" for what, (theirs, ours) in found.items() if theirs != ours]
    if wrong:
        raise UserError(f"vae: {name} does not fit the base: {', '.join(wrong)}.")

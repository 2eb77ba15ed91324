"""Another VAE in the place of the base's own: an AutoencoderKL's folder, a pipeline's, a hub name, or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import HFValidationError

from ether_diffusion.errors import UserError

from .single_file import is_single_file, load_vae_file, open_weights

_WAYS = (
    "Ways to name a VAE: a folder of an AutoencoderKL or of a pipeline in diffusers' layout; a hub name such as "
    "'stabilityai/sd-vae-ft-mse'; a .safetensors or .ckpt file in the original layout."
)


def load_vae(name: str, dtype: torch.dtype = torch.float32, *, allow_pickle: bool = False) -> AutoencoderKL:
    """Load a VAE, on the CPU.

    Args:
        name: A folder with the config.json of an AutoencoderKL; a pipeline's folder, whose `vae/` is taken; a hub name
            of either; a single file.
        allow_pickle: As for `open_weights`.

    Raises:
        UserError: not there, or no AutoencoderKL.
    """
    if is_single_file(name):
        return load_vae_file(open_weights(name, "vae", allow_pickle=allow_pickle), dtype)
    check_vae_name(name)
    try:
        subfolder = _subfolder(name)
        config: Any = AutoencoderKL.load_config(name, subfolder=subfolder)
        if config.get("_class_name") != "AutoencoderKL":
            raise UserError(f"vae: {name} is a {config.get('_class_name')}; expected an AutoencoderKL.")
        return AutoencoderKL.from_pretrained(name, subfolder=subfolder, torch_dtype=dtype)
    except (OSError, HFValidationError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"vae: cannot load {name!r}: {' '.join(str(error).split())[:240]}. {_WAYS}") from error


def check_vae_name(name: str) -> None:
    """Say early that a path cannot be a VAE.

    Raises:
        UserError: the path does not exist, or the folder holds no VAE.
    """
    path = Path(name)
    if path.is_dir():
        if _config_folder(path) is None:
            raise UserError(f"vae: {name} has no config.json, nor has its folder vae/. {_WAYS}")
    elif not path.is_file() and (is_single_file(name) or name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"vae: {name!r} does not exist. {_WAYS}")


def check_vae_fits(vae: AutoencoderKL, own: dict[str, Any], name: str) -> None:
    """Compare a VAE's latents with those that a base's UNet knows.

    Args:
        own: Config of the base's own VAE.

    Raises:
        UserError: other channels, another size, or another scale.
    """
    facts = {
        "latent channels": lambda config: config["latent_channels"],
        "pixels a latent": lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        "scaling factor": lambda config: config["scaling_factor"],
    }
    found = {what: (fact(vae.config), fact(own)) for what, fact in facts.items()}
    wrong = [f"{what} {theirs} in place of {ours}" for what, (theirs, ours) in found.items() if theirs != ours]
    if wrong:
        raise UserError(f"vae: {name} does not fit the base: {', '.join(wrong)}.")


def _config_folder(folder: Path) -> str | None:
    """`""` for a VAE's own folder, `"vae"` for a pipeline's, None for any other."""
    return next((inner for inner in ("", "vae") if (folder / inner / "config.json").is_file()), None)


def _subfolder(name: str) -> str:
    """Where in a folder or a hub repository the VAE is."""
    if Path(name).is_dir():
        return _config_folder(Path(name)) or ""
    try:
        AutoencoderKL.load_config(name)
    except OSError:
        AutoencoderKL.load_config(name, subfolder="vae")
        return "vae"
    return ""

"""Loads the base model: a hub name, a folder, a single file, or `tiny`. No other module knows which kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import check_tree, read_object
from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.weight_files import is_hub_name, loading, weights_digest

from .quantized import dequantized
from .single_file import SUFFIXES, check_single_file, is_single_file, load_single_file, open_weights
from .stable_diffusion_v1 import UNCHECKED, VAE, clip_tokenizer
from .vaes import check_vae_fits, check_vae_name, load_vae

Pipeline = TypeVar("Pipeline", bound=StableDiffusionMixin)

_PARTS = ("unet", "vae", "text_encoder", "tokenizer")
DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = "tiny"
"""The miniature, in the package: Stable Diffusion v1.5's classes and block types, 64 x 64 images, 16 x 16 latents, 10M
parameters. `ether_diffusion/tinyworld/weights/README.md` reports the quality of its images."""


@dataclass(frozen=True, repr=False)
class Base:
    """The parts of a frozen Stable Diffusion."""

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    notes: tuple[str, ...] = ()
    """Which weights of its file were not used."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.resolution} pixels, {self.unet.dtype})"

    @property
    def resolution(self) -> int:
        """The side in pixels of the images that the base was trained on."""
        return int(self.unet.config["sample_size"]) * self.vae_factor

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def prediction_type(self) -> str:
        """The UNet's target: `epsilon` or `v_prediction`."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def pipeline(self, kind: type[Pipeline] = StableDiffusionPipeline, **components: Any) -> Pipeline:
        """The parts as a pipeline of this class, without a safety checker.

        Args:
            components: Parts to add or to replace: `scheduler=…`.
        """
        parts = {part: getattr(self, part) for part in _PARTS}
        if "scheduler" not in components:
            parts["scheduler"] = DDIMScheduler.from_config(self.scheduler_config, clip_sample=False)
        return kind(**(parts | UNCHECKED | components))


def load_base(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
    vae: str | None = None,
    allow_pickle: bool = False,
    unet_dtype: torch.dtype | None = None,
) -> Base:
    """Load a Stable Diffusion, frozen, on the CPU.

    Args:
        name: A hub name (`stable-diffusion-v1-5/stable-diffusion-v1-5`), a folder in diffusers' layout, a single file
            in the original layout (v1 only), or `tiny`.
        dtype: Of all parts.
        revision: Branch, tag or commit of a hub name.
        vae: Another VAE instead of the base's own, as for `load_vae`.
        allow_pickle: Read Python objects of a `.ckpt`, which can run any code.
        unet_dtype: Of the UNet, if it differs.

    Raises:
        UserError: not found, offline, or not a Stable Diffusion of the v1/v2 layout; a VAE that does not fit it.
    """
    notes: tuple[str, ...] = ()
    if name == TINY:
        text_encoder = _whole_text_encoder(str(WEIGHTS / "pipeline"), torch.float32, None)
        pipeline = StableDiffusionPipeline.from_pretrained(
            WEIGHTS / "pipeline", text_encoder=text_encoder, dtype=torch.float32, **UNCHECKED
        )
    elif is_single_file(name):
        file = open_weights(name, "base_model", _WAYS, allow_pickle=allow_pickle)
        pipeline, notes = load_single_file(file, dtype, vae=vae is None)
    else:
        pipeline = _from_pretrained(name, {"default": dtype, "unet": unet_dtype or dtype}, revision)
    if vae is not None:
        other = load_vae(vae, dtype, allow_pickle=allow_pickle)
        check_vae_fits(other, pipeline.vae.config if pipeline.vae is not None else VAE, vae)
        pipeline.vae = other
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
        if not getattr(part, "is_quantized", False):  # a part that was saved quantised keeps its dtype
            move(part, unet_dtype or dtype if part is pipeline.unet else dtype)
    parts = {part: getattr(pipeline, part) for part in _PARTS}
    return Base(name, **parts, scheduler_config=dict(pipeline.scheduler.config), notes=notes)


def load_tokenizer(name: str) -> CLIPTokenizer:
    """The tokenizer of a base alone; a single file has CLIP's. Raises UserError, as `load_base`."""
    check_base(name)
    if is_single_file(name):
        return clip_tokenizer()
    with loading(f"base_model: cannot load the tokenizer of {name!r}", _WAYS):
        return CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" if name == TINY else name, subfolder="tokenizer")


def move(module: nn.Module, to: torch.device | torch.dtype) -> None:
    """Move a module to a device or a dtype, in place; no cast to a dtype that it has, of which diffusers would warn."""
    if isinstance(to, torch.device) or next(module.parameters()).dtype != to:
        module.to(to)


def check_base(name: str, vae: str | None = None) -> None:
    """As `load_base`, as far as names, local configs and headers show it: no weight is read, and no hub is asked."""
    if vae is not None:
        check_vae_name(vae)
    folder = Path(name)
    if is_single_file(name):
        if folder.suffix == ".safetensors" or not folder.is_file():  # a .ckpt has no header: it is read whole
            check_single_file(open_weights(name, "base_model", _WAYS), vae=vae is None)
        return
    if name == TINY or (not folder.exists() and is_hub_name(name)):
        return
    if not folder.exists():
        raise UserError(f"base_model: {name!r} does not exist. {_WAYS}")
    if not (folder / "model_index.json").exists():
        raise UserError(f"base_model: {name} has no model_index.json; expected a folder in diffusers' layout. {_WAYS}")
    check_tree(folder)
    try:
        index = read_object(folder / "model_index.json")
    except UserError as error:
        raise UserError(f"base_model: {error}") from error
    _check_class(name, index)


def check_resolution(resolution: int, base: Base, what: str) -> None:
    """Refuse a side in pixels that the VAE and the UNet cannot halve evenly, or that the miniature cannot fill.

    Args:
        what: The setting or option, for the message.
    """
    if base.name == TINY and resolution > 2 * base.resolution:
        side = base.resolution
        raise UserError(
            f"{what}: {resolution}, but the base {TINY!r} generates {side} x {side} pixels; "
            f"expected at most {2 * side}."
        )
    check_multiple(resolution, base.vae_factor * 2 ** (len(base.unet.config["block_out_channels"]) - 1), what)


def check_multiple(side: int, factor: int, what: str) -> None:
    """As `check_resolution`, for any factor."""
    if side % factor:
        lower = side // factor * factor
        near = " or ".join(str(size) for size in (lower, lower + factor) if size)
        raise UserError(f"{what}: {side} is not a multiple of {factor} pixels; try {near}.")


def fingerprint(module: nn.Module) -> str:
    """The `weights_digest` of a module, whatever its precision and whether it is quantised."""
    return weights_digest({key: dequantized(tensor) for key, tensor in module.state_dict().items()})


_WAYS = (
    f"Ways to name a base: 'tiny' (built in, for trials); a hub name such as '{DEFAULT_BASE}' (needs the network once, "
    f"or `hf download {DEFAULT_BASE}` beforehand); the path of a folder in diffusers' layout, or of a single file "
    f"({', '.join(SUFFIXES)}) of Stable Diffusion v1."
)


def _from_pretrained(name: str, dtype: dict[str, torch.dtype], revision: str | None) -> StableDiffusionPipeline:
    check_base(name)
    with loading(f"base_model: cannot load {name!r}", _WAYS):
        index: Any = StableDiffusionPipeline.load_config(name, revision=revision)
        _check_class(name, index)
        options: dict[str, Any] = {"use_safetensors": True, "image_encoder": None, **UNCHECKED}
        if index.get("text_encoder") == ["transformers", "CLIPTextModel"]:
            options["text_encoder"] = _whole_text_encoder(name, dtype["default"], revision)
        return StableDiffusionPipeline.from_pretrained(name, revision=revision, dtype=dtype, **options)


def _whole_text_encoder(name: str, dtype: torch.dtype, revision: str | None) -> CLIPTextModel:
    """The text encoder of a folder or hub name. transformers gives random numbers to weights that it does not find.

    Raises:
        UserError: it lacks weights.
    """
    options: dict[str, Any] = {"subfolder": "text_encoder", "revision": revision, "use_safetensors": True}
    model, found = CLIPTextModel.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)  # pyright: ignore
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"base_model: {name}: its text encoder lacks {len(missing):,} tensors, such as {missing[0]}, or they have "
            f"names that transformers {transformers.__version__} does not know."
        )
    return model


def _check_class(name: str, index: Any) -> None:
    found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
    if found != "StableDiffusionPipeline":
        raise UserError(f"base_model: {name} is a {found}; ether_diffusion trains StableDiffusionPipeline (v1 and v2).")

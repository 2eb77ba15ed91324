"""Loads the base model: a hub name, a folder, a single file, or `tiny`. No other module knows which kind it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import check_tree, read_object
from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.weight_files import is_hub_name, loading, weights_digest

from .families.family import Diffusion, Family, Parts
from .families.stable_diffusion_v1 import VAE, clip_tokenizer
from .families.table import DEFAULT, FAMILIES, family_for, family_of
from .quantized import dequantized
from .single_file import SUFFIXES, check_single_file, is_single_file, load_single_file, open_weights
from .vaes import check_vae_fits, check_vae_name, load_vae

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = "tiny"
"""The miniature, in the package: Stable Diffusion v1.5's classes and block types, 64 x 64 images, 16 x 16 latents, 10M
parameters. `ether_diffusion/tinyworld/weights/README.md` reports the quality of its images."""


@dataclass(frozen=True, repr=False)
class Base:
    """A frozen model: its family, and its parts, which are attributes under their names in diffusers' pipelines.

    `base.vae`, `base.tokenizer`, and what `base.denoiser` is: `base.unet` or `base.transformer`.
    """

    name: str
    family: Family
    parts: Parts
    scheduler_config: dict[str, Any]
    notes: tuple[str, ...] = ()
    """Which weights of its file were not used."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its pipeline, next to the parts."""

    @classmethod
    def of(cls, name: str, pipeline: Any, notes: tuple[str, ...] = ()) -> Base:
        """The base whose parts a pipeline holds. Raises UserError: it is of no family."""
        family = family_of(pipeline)
        parts = {part: getattr(pipeline, part) for part in family.parts}
        options = {option: pipeline.config[option] for option in family.options}
        return cls(name, family, parts, dict(pipeline.scheduler.config), notes, options)

    def __getattr__(self, part: str) -> Any:
        parts = self.__dict__.get("parts", {})
        if part not in parts:
            raise AttributeError(f"{type(self).__name__} has no {part!r}; its parts: {', '.join(parts)}")
        return parts[part]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}: {self.resolution} pixels, {self.denoiser.dtype})"

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return self.parts[self.family.denoiser]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by name; those that the base was saved without are left out."""
        return {name: self.parts[name] for name in self.family.text_encoders if self.parts[name] is not None}

    @property
    def trainable_text_encoders(self) -> dict[str, Any]:
        """Those of them that can take an adapter."""
        return {name: one for name, one in self.text_encoders.items() if name in self.family.trainable_text_encoders}

    @property
    def adaptable(self) -> dict[str, Any]:
        """The parts that adapters change: the denoiser, and text encoders."""
        return {self.family.denoiser: self.denoiser, **self.trainable_text_encoders}

    @property
    def modules(self) -> dict[str, Any]:
        """The parts that hold weights, by name."""
        return {name: self.parts[name] for name in self.family.modules if self.parts[name] is not None}

    @property
    def resolution(self) -> int:
        """The side in pixels of the images that the base was trained on."""
        return self.family.resolution(self.parts)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return self.family.vae_factor(self.vae)

    @property
    def prediction_type(self) -> str:
        """The target of a denoiser of `Diffusion`: `epsilon` or `v_prediction`."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def prompt_reader(self) -> tuple[Any, int]:
        """The tokenizer of the text encoder that reads most of a prompt, and how many tokens that one reads."""
        return self.family.prompt_reader(self.parts)

    def with_denoiser(self, denoiser: Any) -> Base:
        """The base with another UNet or transformer in the place of its own."""
        return dataclasses.replace(self, parts={**self.parts, self.family.denoiser: denoiser})

    def pipeline(self, kind: Any = None, **components: Any) -> Any:
        """The parts as a pipeline of this class, default: the family's, without a safety checker.

        Args:
            components: Parts to add or to replace: `scheduler=…`.
        """
        if kind is None:
            kind = getattr(diffusers, self.family.pipeline_class)
        if "scheduler" not in components:
            components["scheduler"] = make_scheduler(self.family, self.scheduler_config)
        return kind(**{**self.parts, **self.family.loading, **self.options, **components})


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
        unet_dtype: Of the denoiser, if it differs; and of text encoders that are as large.

    Raises:
        UserError: not found, offline, or not a Stable Diffusion of the v1/v2 layout; a VAE that does not fit it.
    """
    notes: tuple[str, ...] = ()
    if is_single_file(name):
        file = open_weights(name, "base_model", _WAYS, allow_pickle=allow_pickle)
        pipeline, notes = load_single_file(file, dtype, vae=vae is None)
    elif name == TINY:
        pipeline = _from_pretrained(str(WEIGHTS / "pipeline"), torch.float32, torch.float32, None)
    else:
        pipeline = _from_pretrained(name, dtype, unet_dtype or dtype, revision)
    if vae is not None:
        other = load_vae(vae, dtype, allow_pickle=allow_pickle)
        check_vae_fits(other, pipeline.vae.config if pipeline.vae is not None else VAE, vae)
        pipeline.vae = other
    family = family_of(pipeline)
    base = Base.of(name, pipeline, notes)
    for part, module in base.modules.items():
        module.eval().requires_grad_(False)
        if not getattr(module, "is_quantized", False):  # a part that was saved quantised keeps its dtype
            is_large = part == family.denoiser or (family.large_text_encoders and part in family.text_encoders)
            move(module, unet_dtype or dtype if is_large else dtype)
    return base


def family_named(name: str, revision: str | None = None) -> Family:
    """The family of a base, of whose files the index alone is read. Raises UserError, as `load_base`."""
    check_base(name)
    if is_single_file(name) or name == TINY:
        return DEFAULT
    with loading(f"base_model: cannot load {name!r}", _WAYS):
        return _check_class(name, DiffusionPipeline.load_config(name, revision=revision))


def load_prompt_reader(name: str) -> tuple[Any, int]:
    """As `Base.prompt_reader`, without the rest of the base. Raises UserError, as `load_base`."""
    check_base(name)
    if is_single_file(name):
        tokenizer = clip_tokenizer()
        return tokenizer, tokenizer.model_max_length
    with loading(f"base_model: cannot load the tokenizer of {name!r}", _WAYS):
        folder = str(WEIGHTS / "pipeline") if name == TINY else name
        index: Any = DiffusionPipeline.load_config(folder)
        family = _check_class(name, index)
        present = {part: index.get(part) or (None, None) for part in family.parts}
        parts: dict[str, Any] = {part: kind for part, (_, kind) in present.items()}
        for part in family.tokenizers:
            if parts[part] is not None:
                parts[part] = getattr(transformers, parts[part]).from_pretrained(folder, subfolder=part)
        return family.prompt_reader(parts)


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
    check_multiple(resolution, base.vae_factor * base.family.latent_multiple(base.denoiser), what)


def check_takes_hints(base: Base) -> None:
    """Refuse a base to whose denoiser a condition's features cannot be added. Raises UserError."""
    if not base.family.takes_hints:
        known = ", ".join(family.title for family in FAMILIES if family.takes_hints)
        raise UserError(
            f"base_model: {base.name} is of the family {base.family.title}, which follows no conditions here; "
            f"controllable runs take: {known}."
        )


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


def make_scheduler(family: Family, config: dict[str, Any]) -> Any:
    """The scheduler that images are sampled with where none is named."""
    if isinstance(family.objective, Diffusion):
        return DDIMScheduler.from_config(config, clip_sample=False)
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def _from_pretrained(name: str, dtype: torch.dtype, denoiser_dtype: torch.dtype, revision: str | None) -> Any:
    check_base(name)
    with loading(f"base_model: cannot load {name!r}", _WAYS):
        index: Any = DiffusionPipeline.load_config(name, revision=revision)
        family = _check_class(name, index)
        options: dict[str, Any] = {"use_safetensors": True, **family.loading}
        for part in family.text_encoders:
            library, kind = index.get(part) or (None, None)
            if library == "transformers" and kind:
                own = denoiser_dtype if family.large_text_encoders else dtype
                options[part] = _whole_text_encoder(name, part, kind, own, revision)
        absent = [part for part in family.parts if index.get(part) == [None, None]]
        if family.denoiser in absent:
            raise UserError(f"base_model: {name}: its model_index.json has no {family.denoiser}.")
        options |= dict.fromkeys(absent)  # saved without them, which diffusers loads only if each is passed
        pipeline_class = getattr(diffusers, family.pipeline_class)
        dtypes = {"default": dtype, family.denoiser: denoiser_dtype}
        return pipeline_class.from_pretrained(name, revision=revision, dtype=dtypes, **options)


def _whole_text_encoder(name: str, part: str, kind: str, dtype: torch.dtype, revision: str | None) -> nn.Module:
    """A text encoder of a folder or hub name. transformers gives random numbers to weights that it does not find.

    Raises:
        UserError: it lacks weights.
    """
    options: dict[str, Any] = {"subfolder": part, "revision": revision, "use_safetensors": True}
    model_class = getattr(transformers, kind)
    model, found = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"base_model: {name}: its text encoder lacks {len(missing):,} tensors, such as {missing[0]}, or they have "
            f"names that transformers {transformers.__version__} does not know."
        )
    return model


def _check_class(name: str, index: Any) -> Family:
    """The family of a pipeline by its model_index.json. Raises UserError: it is in none."""
    try:
        return family_for(index.get("_class_name") if isinstance(index, dict) else type(index).__name__)
    except UserError as error:
        raise UserError(f"base_model: {name} is {error}") from None

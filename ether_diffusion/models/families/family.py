"""What the package needs to know of a family of models: the interface that each family's file fills in.

Parts of a base go by their names in diffusers' pipelines: `unet` or `transformer`, `vae`, `text_encoder`, `tokenizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Parts = Mapping[str, Any]


@dataclass(frozen=True)
class FlowMatching:
    """A denoiser that predicts the velocity ε - x₀ of x = (1 - σ) x₀ + σ ε (arXiv 2210.02747); see `objective.py`."""

    density: Literal["uniform", "logit_normal"] = "uniform"
    """Of the timesteps in training, before the scheduler's shift."""


@dataclass(frozen=True)
class Diffusion:
    """A denoiser of DDPM's noisy latents, which predicts noise or velocity, as the base's scheduler states."""


class Family(ABC):
    """A family of models: how it is recognised, how it reads prompts and images, what it is trained to do.

    A subclass states the class variables, and implements what differs from Stable Diffusion's way.
    """

    name: str
    """In configs and messages of the command line: `sdxl`."""
    title: str
    """For people."""
    pipeline_class: str
    """The class of its pipelines in diffusers."""
    other_pipelines: tuple[str, ...] = ()
    """Classes of pipelines that take conditions, with the same parts."""
    denoiser: str = "transformer"
    """The part that is trained."""
    text_encoders: tuple[str, ...] = ("text_encoder",)
    """In the order in which a prompt goes through them. Each has a tokenizer of the same number."""
    trainable_text_encoders: tuple[str, ...] = ()
    """Those that can take an adapter (`adapter.text_encoder`): CLIP's."""
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    """Names of the tensors that the denoiser gets of a prompt, each with a dimension of samples first."""
    conditioning_of_frames: tuple[str, ...] = ()
    """And of an image's size and crop."""
    objective: FlowMatching | Diffusion = FlowMatching()
    takes_hints: bool = False
    """Whether a condition's features can be added after its first convolution, as controllable runs do."""
    sampling: Mapping[str, Any] = {}
    """Sampling settings, as `Sampling` has them, that the family's authors recommend, where ours differ."""
    loading: Mapping[str, Any] = {}
    """Arguments of its pipeline's `from_pretrained`, and of the pipeline itself: parts that are left out."""
    half: torch.dtype = torch.float16
    """The half precision that images are generated in by default, where a device has one."""
    large_text_encoders: bool = False
    """Whether text encoders, of billions of weights, are loaded in the denoiser's dtype for training."""
    original_layout: bool = False
    """Whether whole models are written as single files, in Stable Diffusion v1's own layout."""
    kohya_prefixes: Mapping[str, str] = {}
    """Of the keys of LoRA files of kohya's scripts, by part; empty: there is no such layout."""
    options: tuple[str, ...] = ()
    """Settings of its pipelines that a base keeps."""

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    @property
    def modules(self) -> tuple[str, ...]:
        """The parts that hold weights: the denoiser, the VAE, the text encoders."""
        return (self.denoiser, "vae", *self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts of a base: its pipeline's components but the scheduler."""
        return (*self.modules, *self.tokenizers)

    def is_of(self, pipeline_class: str, denoiser_config: Mapping[str, Any]) -> bool:
        """Whether a pipeline of this class, whose denoiser has this config, is of the family."""
        return pipeline_class in (self.pipeline_class, *self.other_pipelines)

    # Prompts

    @abstractmethod
    def tokens(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders read of prompts: token ids, and masks, each with a dimension of prompts first."""

    @abstractmethod
    def encode(self, parts: Parts, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`conditioning` from `tokens` on the text encoders' device, as the family's pipeline computes it."""

    def prompt_reader(self, parts: Parts) -> tuple[Any, int]:
        """The tokenizer of the text encoder that reads most of a prompt, and how many tokens that one reads."""
        return parts["tokenizer"], parts["tokenizer"].model_max_length

    def of_frames(self, frames: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Conditioning by where images come from: the frame of each, (height, width) of the original, (top, left) of
        the crop, (height, width) of the crop."""
        return {}

    # Images

    def moments(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents of images (B, 3, H, W) in [-1, 1]."""
        distribution = vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def latents(self, vae: Any, sampled: Tensor) -> Tensor:
        """The denoiser's latents from the VAE's: shifted and scaled."""
        shift = vae.config.get("shift_factor")
        return (sampled if shift is None else sampled - shift) * vae.config["scaling_factor"]

    def vae_factor(self, vae: Any) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(vae.config["block_out_channels"]) - 1)

    def text_target(self, text_encoder: str, model: Any) -> str | None:
        """A pattern of the attention layers of a text encoder that the features depend on; None: all."""
        return None

    @abstractmethod
    def resolution(self, parts: Parts) -> int:
        """The side in pixels of the images that a base was trained on."""

    @abstractmethod
    def latent_multiple(self, denoiser: Any) -> int:
        """The sides of latents are multiples of this."""

    # The denoiser

    @abstractmethod
    def denoise(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """What the denoiser predicts of noisy latents: noise, or a velocity; in their shape.

        Args:
            noisy: (B, C, h, w), in the denoiser's dtype.
            timesteps: (B,), from 0 to 1000.
            conditioning: What `encode` and `of_frames` return, in the denoiser's dtype.
        """

    def unet_arguments(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Of a family that takes hints: the arguments of its UNet next to noisy latents and timesteps."""
        raise NotImplementedError

    # Sampling

    def call_arguments(self, guidance: float, negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of a call of its pipeline that are not the same in all families."""
        return {"guidance_scale": guidance, "negative_prompt": list(negative_prompts), "eta": 0.0}

    def sort_of(self, negative_prompt: str) -> Any:
        """Images whose negative prompts are of different sorts do not share a call of the pipeline."""
        return None

    def schedulers(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of schedulers, as `sampling.scheduler` has them, that a base with this scheduler's config takes."""
        if isinstance(self.objective, FlowMatching):
            return ("euler", "dpm++")
        return ("dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc")

    # Files of other programs

    def kohya_facts(self, prediction_type: str) -> dict[str, str]:
        """Entries of the metadata of a LoRA file that name the family."""
        return {}


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids (B, length), cut or padded; default: as long as the tokenizer's encoder reads."""
    length = tokenizer.model_max_length if length is None else length
    found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"]


def all_but_last_layer(clip: Any) -> str:
    """A pattern of the attention layers of a CLIP text encoder without the last one, which these features skip."""
    numbers = "|".join(str(k) for k in range(clip.config.num_hidden_layers - 1))
    return rf".*\.layers\.({numbers})\.self_attn\.([qkv]_proj|out_proj)"

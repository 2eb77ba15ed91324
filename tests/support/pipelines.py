"""A complete random pipeline of each family in diffusers' classes, its sizes cut: built in code, nothing is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from string import printable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ether_diffusion.models.families.stable_diffusion_v1 import UNCHECKED

SIDE = 32
"""Of the images of all pipelines, in pixels: latents are half as large."""
WIDTH = 32
"""Of CLIP's and T5's features."""
BUILDERS: dict[str, Callable[[], Any]] = {}


def pipeline(name: str) -> Any:
    """The pipeline of this family, with the same weights at each call, none of them zero or ones alone."""
    with _seeded():
        made = BUILDERS[name]()
        for part in made.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
                _fill_zeros(part)
    made.set_progress_bar_config(disable=True)
    return made


def denoiser(made: Any) -> Any:
    return made.unet if hasattr(made, "unet") else made.transformer


def _family(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        BUILDERS[name] = build
        return build

    return register


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def _fill_zeros(module: nn.Module) -> None:
    """Random numbers for what starts at zero: a transformer's last layers, without which it predicts nothing."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)


# Tokenizers: a token a character


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def t5_tokenizer() -> T5Tokenizer:
    characters: list[Any] = [(character, -3.0) for character in printable if not character.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)  # pyright: ignore[reportCallIssue]


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made: Any = Qwen2Tokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[])
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.chat_template = _CHAT
    return made


# Text encoders and VAEs


def clip(kind: Any = CLIPTextModel, act: str = "quick_gelu", layers: int = 2) -> Any:
    ids: Any = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    sizes: Any = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=514, num_hidden_layers=layers, max_position_embeddings=77, hidden_act=act, **sizes, **ids
    )
    return kind(config)


def t5(width: int = WIDTH) -> T5EncoderModel:
    sizes: Any = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=128, feed_forward_proj="gated-gelu", **sizes))


def vae(channels: int = 4, scale: float = 0.18215, shift: float | None = None) -> AutoencoderKL:
    blocks: Any = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        **blocks,
        latent_channels=channels,
        sample_size=SIDE,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


# Pipelines

_UNET: dict[str, Any] = {"sample_size": SIDE // 2, "block_out_channels": (32, 64), "layers_per_block": 1}
_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _sd(act: str, pad: str, prediction: Any, **unet: Any) -> StableDiffusionPipeline:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    parts: Any = {
        "vae": vae(),
        "text_encoder": clip(act=act),
        "tokenizer": clip_tokenizer(pad),
        "unet": UNet2DConditionModel(**_UNET, **blocks, cross_attention_dim=WIDTH, **unet),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, prediction_type=prediction, **_NOISE),
    }
    return StableDiffusionPipeline(**parts, **UNCHECKED)


@_family("sd1")
def _sd1() -> StableDiffusionPipeline:
    return _sd("quick_gelu", "<|endoftext|>", "epsilon", attention_head_dim=2)


@_family("sd2")
def _sd2() -> StableDiffusionPipeline:
    return _sd("gelu", "!", "v_prediction", attention_head_dim=(2, 4), use_linear_projection=True)


@_family("sdxl")
def _sdxl() -> StableDiffusionXLPipeline:
    blocks: Any = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
    }
    unet = UNet2DConditionModel(
        **_UNET,
        **blocks,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    parts: Any = {
        "vae": vae(scale=0.13025),
        "text_encoder": clip(),
        "text_encoder_2": clip(CLIPTextModelWithProjection, "gelu"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer("!"),
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", **_NOISE),
    }
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def _sd3_with(**text: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    parts: Any = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(16, 1.5305, 0.0609),
        "text_encoder": clip(CLIPTextModelWithProjection),
        "text_encoder_2": clip(CLIPTextModelWithProjection, "gelu"),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer("!"),
    }
    return StableDiffusion3Pipeline(**parts, **text)


@_family("sd3")
def _sd3() -> StableDiffusion3Pipeline:
    return _sd3_with(text_encoder_3=t5(2 * WIDTH), tokenizer_3=t5_tokenizer())


@_family("sd3 without t5")
def _sd3_without_t5() -> StableDiffusion3Pipeline:
    return _sd3_with(text_encoder_3=None, tokenizer_3=None)


def _flux_with(guidance: bool, **scheduler: Any) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    parts: Any = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler),
        "vae": vae(16, 0.3611, 0.1159),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": transformer,
    }
    return FluxPipeline(**parts)


@_family("flux")
def _flux() -> FluxPipeline:
    """Guidance-distilled, as FLUX.1-dev."""
    return _flux_with(True, shift=3.0, use_dynamic_shifting=True)


@_family("flux schnell")
def _flux_schnell() -> FluxPipeline:
    return _flux_with(False, shift=1.0)


@_family("z-image")
def _z_image() -> ZImagePipeline:
    sizes: Any = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    parts: Any = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(16, 0.3611, 0.1159),
        "text_encoder": Qwen3Model(Qwen3Config(**sizes, **heads)),
        "tokenizer": qwen_tokenizer(),
        "transformer": transformer,
    }
    return ZImagePipeline(**parts)

"""`tiny`: a complete Stable Diffusion in miniature, built in code from a seed, with random weights.

The same classes, block types and interfaces as Stable Diffusion v1.5, small enough that every path of the package runs
on two CPU cores in seconds: 64 x 64 pictures, 16 x 16 latents, 1.5M parameters. It knows no pictures: what it draws is
noise with structure, before fine-tuning and after.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .stable_diffusion_v1 import byte_symbols

SEED = 20240529
IMAGE_SIZE = 64


def build_tiny(seed: int = SEED) -> StableDiffusionPipeline:
    """The miniature pipeline, in fp32 on the CPU. The same weights for the same seed; global generators untouched."""
    tokenizer: Any = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore
            up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore
            block_out_channels=(16, 32, 32),  # pyright: ignore
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
            # Gives the latents of photographs a standard deviation near one, as 0.18215 does for the full model's.
            scaling_factor=3.3,
        )
        # Latents that carry the picture and little noise, as a trained encoder's: log-variances at a constant -8.
        quant = vae.quant_conv
        assert quant is not None
        with torch.no_grad():
            quant.weight[4:].zero_()
            quant.bias[4:].fill_(-8)  # pyright: ignore[reportOptionalSubscript]
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=64,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),  # pyright: ignore
            layers_per_block=2,
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(  # pyright: ignore[reportArgumentType]
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,  # pyright: ignore
        feature_extractor=None,  # pyright: ignore
        requires_safety_checker=False,
    )
    for part in (vae, text_encoder, unet):
        part.eval().requires_grad_(False)
    return pipeline


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer without merges: one token a byte, so that it takes any prompt. 77 tokens, as CLIP's."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=77)

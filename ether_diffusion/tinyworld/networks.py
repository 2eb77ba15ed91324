"""The miniature's networks with random weights: a Stable Diffusion in diffusers' classes, scorers in transformers'."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from .scenes import SIZE

VAE_FACTOR = 4  # pixels per latent along one side
LATENT_CHANNELS = 8
TEXT_WIDTH = 128
EMBEDDING = 128  # width of CLIP's joint space

TOWER: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
"""Every transformer here."""

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_vae() -> AutoencoderKL:
    """(B, 3, 64, 64) in ±1 <-> latents (B, 8, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 64),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's blocks on three levels: convolutions at 16 x 16, cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, in diffusers' historical naming
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with v-prediction."""
    return DDIMScheduler(**SCHEDULER)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Text and image towers. The text tower is the pipeline's text encoder."""
    special: Any = tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=EMBEDDING,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
        **TOWER,
    )
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=EMBEDDING, **TOWER)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING))


def build_backbone() -> ViTModel:
    """A vision transformer in the role of DINO: its class token identifies the individual in an image."""
    return ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **TOWER), add_pooling_layer=False)


def build_segmenter(names: tuple[str, ...]) -> SegformerForSemanticSegmentation:
    """SegFormer with halved strides for small images: (B, 3, 64, 64) -> logits (B, labels, 32, 32).

    Args:
        names: The names of the labels; the first is "unlabelled".
    """
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[24, 48, 96, 128],
            depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 4, 4],
            sr_ratios=[4, 2, 1, 1],
            strides=[2, 2, 2, 2],
            patch_sizes=[5, 3, 3, 3],
            decoder_hidden_size=96,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
            id2label=dict(enumerate(names)),  # pyright: ignore[reportArgumentType]
            label2id={name: k for k, name in enumerate(names)},
        )
    )

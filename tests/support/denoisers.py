"""A small random denoiser of many classes of diffusers, with inputs for a batch of three, to try adapters on.

Nothing is fetched. The sizes are the smallest that the classes take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

BATCH = 3
HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}


@dataclass(frozen=True)
class Denoiser:
    """A class, how small it can be, and what its forward pass takes."""

    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    pipeline: str = ""
    """Of diffusers, whose `load_lora_weights` takes LoRA files for it; empty: there is none."""
    class_name: str = ""
    """Where it is not the row's name."""

    def build(self, name: str) -> Any:
        """The model with the same weights at each call, none of them zeros alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = getattr(diffusers, self.class_name or name)(**self.settings).eval()
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return model


def forward(model: Any, row: Denoiser) -> Tensor:
    """What a model returns for its inputs, one tensor."""
    found = model(**row.inputs(), return_dict=False)
    found = found[0] if isinstance(found, tuple) else found
    return torch.stack(list(found)) if isinstance(found, list) else found


def numbers(*shape: int) -> Tensor:
    """The same normal numbers for a shape, whatever is asked for before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def image(channels: int, side: int = 8) -> Tensor:
    return numbers(BATCH, channels, side, side)


def film(channels: int, side: int = 8, frames: int = 1) -> Tensor:
    return numbers(BATCH, channels, frames, side, side)


def text(width: int, length: int = 6) -> Tensor:
    return numbers(BATCH, length, width)


def times(scale: float = 1000) -> Tensor:
    return torch.tensor([0.2, 0.5, 0.9]) * scale


def mask(length: int = 6) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.int64)


def places(rows: int, columns: int, width: int = 3) -> Tensor:
    found = torch.zeros(rows, columns, width)
    found[..., 1] += torch.arange(rows)[:, None]
    found[..., 2] += torch.arange(columns)[None]
    return found.reshape(rows * columns, width)


def _unet(**conditions: Any) -> dict[str, Any]:
    return {"sample": image(4), "timestep": times().long(), "encoder_hidden_states": text(32), **conditions}


def _packed(width: int = 64) -> dict[str, Any]:
    ids = {"img_ids": places(4, 4), "txt_ids": torch.zeros(6, 3)}
    return {"hidden_states": text(width, 16), "encoder_hidden_states": text(32), "timestep": times(1), **ids}


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
_XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (2, 1),
    "projection_class_embeddings_input_dim": 32 + 48,
}
_sizes: dict[str, Any] = {
    "original_size": torch.full((BATCH, 2), 64.0),
    "target_size": torch.full((BATCH, 2), 64.0),
    "crop_coords": torch.zeros(BATCH, 2),
}

DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(_UNET, _unet, "StableDiffusionPipeline"),
    "UNet2DConditionModel, XL": Denoiser(
        {**_UNET, **_XL},
        lambda: _unet(added_cond_kwargs={"text_embeds": numbers(BATCH, 32), "time_ids": numbers(BATCH, 6)}),
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
    ),
    "SD3Transformer2DModel": Denoiser(
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
        lambda: {
            "hidden_states": image(16),
            "encoder_hidden_states": text(32),
            "pooled_projections": numbers(BATCH, 32),
            "timestep": times(),
        },
        "StableDiffusion3Pipeline",
    ),
    "FluxTransformer2DModel": Denoiser(
        {
            "num_layers": 1,
            "num_single_layers": 1,
            **HEADS,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {**_packed(), "pooled_projections": numbers(BATCH, 32), "guidance": torch.ones(BATCH)},
        "FluxPipeline",
    ),
    "Flux2Transformer2DModel": Denoiser(
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            **HEADS,
            "joint_attention_dim": 32,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        lambda: {
            "hidden_states": text(16, 16),
            "encoder_hidden_states": text(32),
            "timestep": times(1),
            "img_ids": places(4, 4, 4),
            "txt_ids": torch.zeros(6, 4),
        },
        "Flux2KleinPipeline",
    ),
    "ZImageTransformer2DModel": Denoiser(
        {
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [1024, 64, 64],
        },
        lambda: {"x": list(film(16).unbind(0)), "t": times(1), "cap_feats": list(text(16).unbind(0))},
        "ZImagePipeline",
    ),
    "QwenImageTransformer2DModel": Denoiser(
        {"num_layers": 2, **HEADS, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4)},
        lambda: {
            "hidden_states": text(64, 16),
            "encoder_hidden_states": text(32),
            "encoder_hidden_states_mask": mask(),
            "timestep": times(1),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
        },
        "QwenImagePipeline",
    ),
    "SanaTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            **HEADS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        lambda: {"hidden_states": image(4), "encoder_hidden_states": text(16), "timestep": times()},
        "SanaPipeline",
    ),
    "Lumina2Transformer2DModel": Denoiser(
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (8, 4, 4),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        lambda: {
            "hidden_states": image(16),
            "timestep": times(1),
            "encoder_hidden_states": text(16),
            "encoder_attention_mask": mask().bool(),
        },
        "Lumina2Pipeline",
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            **HEADS,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda: {"hidden_states": image(4), "encoder_hidden_states": text(32), "timestep": times(1)},
        "AuraFlowPipeline",
    ),
    "CogView4Transformer2DModel": Denoiser(
        {
            "num_layers": 2,
            **HEADS,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: {"hidden_states": image(16), "encoder_hidden_states": text(32), "timestep": times(), **_sizes},
        "CogView4Pipeline",
    ),
    "CogView3PlusTransformer2DModel": Denoiser(
        {
            "num_layers": 2,
            **HEADS,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: {"hidden_states": image(16), "encoder_hidden_states": text(32), "timestep": times(), **_sizes},
    ),
    "ChromaTransformer2DModel": Denoiser(
        {
            "num_layers": 1,
            "num_single_layers": 1,
            **HEADS,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _packed,
        "ChromaPipeline",
    ),
    "BriaTransformer2DModel": Denoiser(
        {
            "in_channels": 64,
            "num_layers": 1,
            "num_single_layers": 1,
            **HEADS,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
        _packed,
    ),
    "HunyuanImageTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": image(4),
            "timestep": times(),
            "encoder_hidden_states": text(32),
            "encoder_attention_mask": mask(),
        },
    ),
    "HunyuanVideoTransformer3DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": False,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": film(4),
            "timestep": times(),
            "encoder_hidden_states": text(32),
            "encoder_attention_mask": mask(),
            "pooled_projections": numbers(BATCH, 16),
        },
        "HunyuanVideoPipeline",
    ),
    "WanTransformer3DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        lambda: {"hidden_states": film(4), "timestep": times(), "encoder_hidden_states": text(32)},
        "WanPipeline",
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        {
            "in_channels": 8,
            "out_channels": 8,
            **HEADS,
            "cross_attention_dim": 32,
            "num_layers": 1,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": text(8, 16),
            "encoder_hidden_states": text(16),
            "timestep": times(),
            "encoder_attention_mask": mask(),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
        "LTXPipeline",
    ),
    "CogVideoXTransformer3DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 1,
            "max_text_seq_length": 6,
        },
        lambda: {
            "hidden_states": film(4).transpose(1, 2),
            "encoder_hidden_states": text(32),
            "timestep": times(),
        },
        "CogVideoXPipeline",
    ),
    "MochiTransformer3DModel": Denoiser(
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "max_sequence_length": 6,
        },
        lambda: {
            "hidden_states": film(4),
            "encoder_hidden_states": text(32),
            "timestep": times(),
            "encoder_attention_mask": mask().bool(),
        },
        "MochiPipeline",
    ),
    "CosmosTransformer3DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 32,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
        },
        lambda: {
            "hidden_states": film(4),
            "timestep": times(),
            "encoder_hidden_states": text(32),
            "padding_mask": torch.zeros(1, 1, 8, 8),
        },
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        {
            "in_text_dim": 32,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": film(4).permute(0, 2, 3, 4, 1),
            "encoder_hidden_states": text(32),
            "timestep": times(),
            "pooled_projections": numbers(BATCH, 16),
            "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
        },
        "Kandinsky5T2VPipeline",
    ),
    "PixArtTransformer2DModel": Denoiser(
        {
            **HEADS,
            "num_layers": 1,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": image(4),
            "encoder_hidden_states": text(16),
            "timestep": times(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "DiTTransformer2DModel": Denoiser(
        {**HEADS, "num_layers": 1, "sample_size": 8, "norm_num_groups": 4},
        lambda: {"hidden_states": image(4), "timestep": times().long(), "class_labels": torch.tensor([1, 2, 3])},
    ),
    "HunyuanDiT2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 6,
            "text_len_t5": 6,
        },
        lambda: {
            "hidden_states": image(4),
            "timestep": times(),
            "encoder_hidden_states": text(32),
            "text_embedding_mask": mask(),
            "encoder_hidden_states_t5": text(32),
            "text_embedding_mask_t5": mask(),
            "image_meta_size": torch.full((BATCH, 6), 64.0),
            "style": torch.zeros(BATCH, dtype=torch.int64),
            "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        },
    ),
    "PRXTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda: {"hidden_states": image(4), "timestep": times(1), "encoder_hidden_states": text(16)},
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [32, 16],
            "text_emb_dim": 64,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": image(4),
            "timesteps": times(),
            "encoder_hidden_states_t5": text(32),
            "encoder_hidden_states_llama3": numbers(2, BATCH, 6, 16),
            "pooled_embeds": numbers(BATCH, 64),
        },
        "HiDreamImagePipeline",
    ),
}


@functools.cache
def built(name: str) -> Any:
    """A model of this row, for tests that leave it as it is."""
    return DENOISERS[name].build(name)

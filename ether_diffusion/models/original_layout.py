"""The key map between diffusers' names of Stable Diffusion v1's weights and the original one-file layout.

It is one to one: a reader looks up the names that a part's keys have in a file, a writer writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."

Config = Mapping[str, Any]


def original_names(part: str, keys: Iterable[str], config: Config) -> dict[str, str]:
    """For each key of a part's `state_dict` (`unet`, `vae`, `text_encoder`) its name in the original layout."""
    return {key: _NAMES[part](key, config) for key in keys}


def original_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of a weight with this name there: the VAE's attention consists of 1 x 1 convolutions."""
    return (*shape, 1, 1) if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) else shape


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_name(key: str, config: Config) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` -> `model.diffusion_model.input_blocks.1.0.in_layers.2.weight`."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key):
        side, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        layers = config["layers_per_block"]
        if kind == "downsamplers":
            name = f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        elif kind == "upsamplers":
            after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
            name = f"output_blocks.{block * (layers + 1) + layers}.{after}.{rest}"
        else:
            number = block * (layers + 1) + place + (side == "down")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{_unet_part(kind, rest)}"
    elif found := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", key):
        kind, place = found[1], int(found[2])
        number = 1 if kind == "attentions" else 2 * place
        name = f"middle_block.{number}.{_unet_part(kind, found[3]).partition('.')[2]}"
    else:
        name = _replace_start(key, _UNET_ENDS)
    return UNET_PREFIX + name


def _vae_name(key: str, config: Config) -> str:
    """`decoder.up_blocks.0.resnets.0.conv1.weight` -> `first_stage_model.decoder.up.3.block.0.conv1.weight`."""
    name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, block, kind, place, rest = found[1], int(found[2]), found[3], found[4], found[5]
        if side == "decoder":
            block = len(config["block_out_channels"]) - 1 - block
        inner = f"block.{place}" if kind == "resnets" else kind.removesuffix("rs")  # downsamplers -> downsample
        name = f"{side}.{'down' if side == 'encoder' else 'up'}.{block}.{inner}.{rest}"
    elif found := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        name = f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    elif found := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", name):
        name = f"{found[1]}.mid.attn_1.{_replace_start(found[2], _VAE_ATTENTION)}"
    return VAE_PREFIX + name


def _text_name(key: str, config: Config) -> str:
    """`embeddings.token_embedding.weight`, with transformers < 5.6 `text_model.…` -> `cond_stage_model.…`."""
    return TEXT_PREFIX + key.removeprefix("text_model.")


_NAMES: dict[str, Callable[[str, Config], str]] = {
    "unet": _unet_name,
    "vae": _vae_name,
    "text_encoder": _text_name,
}


def _unet_part(kind: str, rest: str) -> str:
    return f"1.{rest}" if kind == "attentions" else f"0.{_replace_start(rest, _RESNET)}"


def _replace_start(key: str, table: Mapping[str, str]) -> str:
    start = next((start for start in table if key.startswith(f"{start}.")), None)
    return key if start is None else table[start] + key.removeprefix(start)

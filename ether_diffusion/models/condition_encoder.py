"""The condition encoder: a hint's pixels -> features of the UNet's first convolution (section 5.1.2); on disk and back.

ControlNet's hint block alone: 3 x 3 convolutions with SiLU between; every second one halves the side, until one feature
stands for one latent. The last convolution starts at zero, so that training starts at the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.randomness import derive_seed, seeded

from .module_files import find_module, load_module

FOLDER, WHAT = "condition_encoder", "condition encoder"
BLOCK_CHANNELS = (16, 32, 96, 256)
SILU_GAIN = 1.676  # 1 / rms of silu(x), x standard normal


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Hints (B, 3, H, W) in [0, 1] -> features (B, C, H / factor, W / factor), zero until trained.

    Args:
        out_channels: C, the width of the UNet's first convolution.
        block_channels: Widths of the convolutions; each but the first halves the side.
        in_channels: Of the hints.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, out_channels: int = 320, block_channels: tuple[int, ...] = BLOCK_CHANNELS, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.embedding = ControlNetConditioningEmbedding(out_channels, in_channels, tuple(block_channels))
        self.gradient_checkpointing = False

    @property
    def factor(self) -> int:
        """Pixels per feature, along one side."""
        return 2 ** (len(self.config["block_channels"]) - 1)

    def forward(self, hint: Tensor) -> Tensor:
        hint = hint.to(self.dtype)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            checkpoint: Any = self._gradient_checkpointing_func  # set where checkpointing is enabled
            return checkpoint(self.embedding, hint)
        return self.embedding(hint)


def build_condition_encoder(unet: nn.Module, vae_factor: int, seed: int = 0) -> ConditionEncoder:
    """An untrained encoder for this UNet, in fp32.

    Args:
        unet: A `UNet2DConditionModel`; only its config is read.
        vae_factor: Pixels per latent along one side, a power of two up to 8.
        seed: Of the initial weights. The global generator does not change.

    Raises:
        UserError: as `channels_for`.
    """
    channels = channels_for(vae_factor)
    with seeded(derive_seed(seed, "condition-encoder-init")):
        encoder = ConditionEncoder(_width(unet), channels)
        _keep_variance(encoder)
    return encoder


def channels_for(vae_factor: int) -> tuple[int, ...]:
    """Widths of the convolutions for this number of pixels per latent: (16, 32, 96, 256) for 8.

    Raises:
        UserError: another factor than 1, 2, 4 or 8.
    """
    factors = [2**k for k in range(len(BLOCK_CHANNELS))]
    if vae_factor not in factors:
        raise UserError(f"condition encoder: {vae_factor} pixels per latent; allowed: {', '.join(map(str, factors))}.")
    return BLOCK_CHANNELS[: factors.index(vae_factor) + 1]


@torch.no_grad()
def _keep_variance(encoder: ConditionEncoder) -> None:
    """Initialise the convolutions before the last one so that variance between places passes through (He et al. 2015).

    PyTorch's own initial weights halve it or worse in each of them, so that the last one sees little but biases.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module is not encoder.embedding.conv_out:
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=SILU_GAIN / fan_in**0.5)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def load_condition_encoder(path: str | Path, unet: nn.Module) -> ConditionEncoder:
    """Read a saved encoder, in fp32 on the CPU, frozen.

    Args:
        path: As for `find_condition_encoder`.
        unet: The UNet that is to take the features; only its config is read.

    Raises:
        UserError: no encoder there; as `load_module`; or its features are not as wide as the UNet's.
    """
    folder = find_condition_encoder(path)
    if folder is None:
        raise UserError(f"{path} holds no condition encoder; expected a run folder, or its folder {FOLDER}/.")

    def check(encoder: ConditionEncoder) -> None:
        found, expected = encoder.config["out_channels"], _width(unet)
        if found != expected:
            features = f"its features have {found} channels, and the UNet's first convolution has {expected}"
            raise UserError(f"{folder} does not fit the base: {features}.")

    return load_module(ConditionEncoder, folder, WHAT, check)


def find_condition_encoder(path: str | Path) -> Path | None:
    """The folder of a saved encoder: the path itself, in a run, or in the last of its checkpoints, as `find_module`."""
    return find_module(path, FOLDER, ConditionEncoder.__name__)


def _width(unet: nn.Module) -> int:
    config: Any = unet.config
    return int(config["block_out_channels"][0])

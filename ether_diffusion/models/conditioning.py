"""Adds a condition's features to a UNet's, once, after its first convolution; diffusers' class does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .condition_encoder import ConditionEncoder


class ConditionedUNet(nn.Module):
    """A UNet and the encoder of its condition: all that a controllable run trains, in one module."""

    def __init__(self, unet: nn.Module, condition_encoder: ConditionEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.condition_encoder = condition_encoder

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        **others: Any,
    ) -> Tensor:
        """Predict noise or velocity (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w), in the UNet's dtype.
            timesteps: (B,).
            encoder_hidden_states: (B, 77, D), in the UNet's dtype.
            hint: (B, 3, H, W) in [0, 1], in any dtype.
            others: Other arguments of the UNet, such as `added_cond_kwargs`.
        """
        with added_features(self.unet, self.condition_encoder(hint)):
            return self.unet(noisy_latents, timesteps, encoder_hidden_states, **others).sample


class AddedFeatures(nn.Module):
    """A convolution whose outputs get features added: it replaces the UNet's first one within `added_features`."""

    def __init__(self, convolution: nn.Module, features: Tensor | None) -> None:
        super().__init__()
        self.convolution = convolution
        self.features = features

    def forward(self, latents: Tensor) -> Tensor:
        output = self.convolution(latents)
        if self.features is None:
            return output
        copies, rest = divmod(len(output), len(self.features))
        if rest or output.shape[1:] != self.features.shape[1:]:
            raise ValueError(
                f"condition features are {tuple(self.features.shape)}; the UNet's first convolution returns "
                f"{tuple(output.shape)}, which is not a whole number of them."
            )
        # A batch under guidance has all images once for each branch, and every branch gets the hint.
        return output + self.features.repeat(copies, 1, 1, 1).to(output.dtype)


@contextmanager
def added_features(unet: nn.Module, features: Tensor | None) -> Iterator[AddedFeatures]:
    """Within the block each forward pass of the UNet gets `features` added after its first convolution.

    The convolution is replaced, not hooked: torch.compile does not check whether hooks were added or removed, and a
    UNet that was compiled outside the block would silently drop the hint. Afterwards the UNet is as before.

    Args:
        unet: A `UNet2DConditionModel`, bare or wrapped (PEFT, torch.compile, data parallelism).
        features: (B, C, h, w), in any floating dtype, for batches of B, 2B, …: the k-th of each B gets the k-th. None
            adds nothing. The `features` of the yielded module may be replaced between forward passes.

    Raises:
        RuntimeError: features are added to this UNet already.
        ValueError: in the forward pass, where the shapes do not fit.
    """
    bare = next(module for module in unet.modules() if isinstance(module, UNet2DConditionModel))
    convolution = bare.conv_in
    if isinstance(convolution, AddedFeatures):
        raise RuntimeError("a condition's features are added to this UNet already; they are added once.")
    stand_in = AddedFeatures(convolution, features)
    bare.conv_in = stand_in  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield stand_in
    finally:
        bare.conv_in = convolution

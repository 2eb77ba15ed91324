"""ControlNet as a task for the training loop: controllable generation with a ControlNet in the encoder's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from ether_diffusion.data.condition_kind import ConditionKind, save_condition_kind
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.models.bases import Base
from ether_diffusion.models.controlnet import ControlledUNet, controlnet_pipeline
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.saved_modules import CONTROLNET, save_whole_module

from .controllable_task import ControllableTask
from .denoising import squared_errors


class ControlNetLoss(ControlledUNet):
    """The UNet, the ControlNet and the loss: all that is trained, in one module."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mean squared error of the prediction, each sample's times its weight."""
        inputs = [batch[name] for name in ("noisy_latents", "timesteps", "encoder_hidden_states", "hint")]
        errors = squared_errors(super().forward(*inputs), batch["target"]).mean(dim=(1, 2, 3))  # (B,)
        return {"loss": (errors * batch["weights"]).mean()}


class ControlNetTask(ControllableTask):
    """Data and images are ControllableTask's; what is trained, saved and drawn with is a ControlNet.

    Args:
        controlnet: In the place of the condition encoder; the UNet stays as it is.
    """

    def __init__(
        self,
        config: Any,
        base: Base,
        controlnet: ControlNetModel,
        dataset: ControllableDataset,
        examples: ControllableDataset,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, base, controlnet, dataset, examples, device, dtype)
        self.controlnet = controlnet
        self.module: nn.Module = ControlNetLoss(base.unet, controlnet)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.controlnet.parameters()), "lr": learning_rate}]

    def save(self, folder: Path, step: int) -> None:
        save_whole_module(
            self.controlnet,
            folder / CONTROLNET.folder,
            CONTROLNET,
            base_model=self.config.base_model,
            revision=self.config.revision,
            vae=self.config.vae,
            notes={"condition": self.pairs.kind, "training steps": step, "seed": self.config.seed},
        )
        save_condition_kind(ConditionKind.of(self.pairs), folder / CONTROLNET.folder)

    def load(self, folder: Path) -> None:
        fill_module(self.controlnet, folder / CONTROLNET.folder, CONTROLNET.what)

    def pipeline(self) -> Any:
        return controlnet_pipeline(self.base, self.controlnet)

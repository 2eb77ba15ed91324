"""A task that the package does not know: a UNet learns to denoise plain colours, without prompts."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from ether_diffusion.adapters.methods import AdapterSettings, EtherPlusSettings
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.config import Settings
from ether_diffusion.models.bases import Base
from ether_diffusion.randomness import generator
from ether_diffusion.training.config import TaskConfig, ValidationSettings
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.run_task import run_task
from ether_diffusion.training.schedule import Plan
from ether_diffusion.training.task import DenoisingLoss, Report, Task, TrainingTask


class ToyData(Settings):
    colours: PositiveInt = 3
    resolution: PositiveInt = 32


class ToyConfig(TaskConfig):
    adapter: AdapterSettings = EtherPlusSettings()
    data: ToyData = ToyData()
    validation: ValidationSettings = ValidationSettings()


def resolve(config: ToyConfig) -> ToyConfig:
    rate = config.training.learning_rate or config.adapter.learning_rates.get("toy", 1e-3)
    return config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": rate})})


def run(config: ToyConfig, *, dry_run: bool = False) -> Report:
    return run_task(ToyTask, resolve(config), dry_run)


TASK = TrainingTask(name="toy", config=ToyConfig, resolve=resolve, run=run, hints={"colors": "data.colours"})


class Colours(Dataset[dict[str, Any]]):
    """Sample i shows colour i modulo their number."""

    def __init__(self, data: ToyData, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return self.data.colours

    def __getitem__(self, index: int) -> dict[str, Any]:
        colour = torch.rand(3, 1, 1, generator=generator(self.seed, "colour", index % len(self))) * 2 - 1
        return {"index": index, "pixel_values": colour.expand(3, self.data.resolution, self.data.resolution)}


class ToyTask(Task[ToyConfig]):
    def __init__(self, config: ToyConfig, previous: SavedAdapter | None, resumed: bool) -> None:
        super().__init__(config, previous, resumed)
        self.dataset = Colours(config.data, config.seed)
        self.samples_per_epoch = len(self.dataset)

    def build(self, base: Base, plan: Plan, accelerator: Accelerator) -> None:
        super().build(base, plan, accelerator)
        self.module = DenoisingLoss(base)

    def summary(self) -> list[str]:
        return [f"Colours: {len(self.dataset)}"]

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: [sample[key] for sample in samples] for key in ("index", "pixel_values")}

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        moments = [self.encoders.moments(pixels) for pixels in batch["pixel_values"]]
        streams = [("toy", index) for index in batch["index"]]
        return {**self.noised(moments, streams), **self.text([""] * len(streams))}

    def example(self, folder: RunFolder) -> list[str]:
        return ["--prompt", ""]

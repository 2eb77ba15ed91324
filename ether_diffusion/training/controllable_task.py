"""Controllable generation as a task for the training loop: images and hints -> noisy latents -> the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ether_diffusion.adapters.attach import trainable_parameters
from ether_diffusion.adapters.loading import fill_adapter
from ether_diffusion.adapters.storage import read_adapter, save_adapter
from ether_diffusion.data.condition_kind import ConditionKind, save_condition_kind
from ether_diffusion.data.pair_dataset import ControllableDataset, ImageKey
from ether_diffusion.generation import fault
from ether_diffusion.generation.conditioned import ConditionedJob, sample_conditioned
from ether_diffusion.models.bases import Base
from ether_diffusion.models.condition_encoder import FOLDER, fill_condition_encoder, save_condition_encoder
from ether_diffusion.models.conditioning import ConditionedUNet
from ether_diffusion.models.controllable_pipeline import controllable_pipeline
from ether_diffusion.pictures import save_png, sheet

from .denoising import DenoisingTask, squared_errors
from .latent_cache import EncodedPairs, EncoderCache

if TYPE_CHECKING:
    from .controllable import ControllableConfig


class ConditionedLoss(ConditionedUNet):
    """The UNet, the condition encoder and the loss: all that is trained, in one module."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mean squared error of the prediction, each sample's times its weight."""
        inputs = [batch[name] for name in ("noisy_latents", "timesteps", "encoder_hidden_states", "hint")]
        errors = squared_errors(super().forward(*inputs), batch["target"]).mean(dim=(1, 2, 3))  # (B,)
        return {"loss": (errors * batch["weights"]).mean()}


class ControllableTask(DenoisingTask):
    """Images, hints and captions -> noisy latents -> the loss of the UNet that sees the hints.

    Args:
        encoder: The condition encoder.
        dataset: The pairs to train on.
        examples: The pairs to draw for validation, by their places in order.
    """

    config: ControllableConfig

    def __init__(
        self,
        config: ControllableConfig,
        base: Base,
        encoder: Any,
        dataset: ControllableDataset,
        examples: ControllableDataset,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, base, device, dtype)
        self.dataset: Dataset[dict[str, Any]] = dataset
        self.pairs, self.examples, self.encoder = dataset.pairs, examples, encoder
        self.module: nn.Module = ConditionedLoss(base.unet, encoder)

    def use_cache(self, root: Path, samples: int, accelerator: Accelerator) -> None:
        """Encode the images of the run's first `samples` samples once, into `root`, and let the VAE go.

        Where validation needs it, it waits on the CPU.
        """
        source: Any = self.dataset
        places: dict[ImageKey, int] = {}
        # An epoch shows each image once; mirrored ones come in any.
        for index in range(samples if source.horizontal_flip else min(samples, len(source))):
            places.setdefault(source.key(index), index)

        def encode(key: ImageKey) -> dict[str, Tensor]:
            mean, deviation = self._encode(source[places[key]]["pixel_values"])
            return {"mean": mean, "deviation": deviation}

        with torch.no_grad():
            cache = EncoderCache(root, "latents", self.base.vae, {"dtype": str(self.base.vae.dtype)})
            self.dataset = EncodedPairs(source, cache.make(places, encode, accelerator))
        self.offload_encoders([self.base.vae], needed_for_sampling=bool(self.config.validation.images))

    @property
    def has_adapter(self) -> bool:
        return bool(self.config.adapter.peft_type)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The adapter's, where there is one, and the encoder's at a rate of its own, unless it is frozen."""
        adapter = {"params": list(trainable_parameters(self.base.unet).values()), "lr": learning_rate}
        if self.config.freezes_encoder:
            return [adapter]
        rate = self.config.training.encoder_learning_rate
        encoder = {"params": list(self.encoder.parameters()), "lr": rate}
        return [adapter, encoder] if self.has_adapter else [encoder]

    @staticmethod  # workers that are spawned, as on macOS, are sent it: without the models
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "moments" if "moments" in samples[0] else "pixel_values"
        return {
            kind: [sample[kind] for sample in samples],
            "hint": torch.stack([sample["hint"] for sample in samples]),
            "prompts": [sample["prompt"] for sample in samples],
            "streams": [("pair", sample["index"]) for sample in samples],
        }

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Noisy latents, targets and text features, each a function of the sample alone; hints as they are."""
        moments = batch.get("moments") or [self._encode(pixels) for pixels in batch["pixel_values"]]
        noised = self.noised(moments, batch["streams"])
        return {**noised, **self.text(batch["prompts"]), "hint": batch["hint"].to(self.device)}

    def save(self, folder: Path, step: int) -> None:
        save_condition_encoder(self.encoder, folder / FOLDER)
        save_condition_kind(ConditionKind.of(self.pairs), folder / FOLDER)
        if not self.has_adapter:
            return
        save_adapter(
            self.base.unet,
            folder / "adapter",
            base_model=self.config.base_model,
            revision=self.config.revision,
            vae=self.config.vae,
            notes={
                "condition": f"{self.pairs.kind}, through the encoder in `{FOLDER}/` beside this folder",
                "training steps": step,
                "seed": self.config.seed,
            },
        )

    def load(self, folder: Path) -> None:
        fill_condition_encoder(self.encoder, folder / FOLDER)
        if self.has_adapter:
            fill_adapter(self.base.unet, read_adapter(folder / "adapter"))

    def pipeline(self) -> Any:
        """What draws for validation, of the models as they are."""
        return controllable_pipeline(self.base, self.encoder)

    @torch.no_grad()
    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Draw the example pairs, a row each: condition, drawn image, the image itself. Counts NaN and black ones."""
        settings = self.config.validation
        examples = [self.examples.example(k) for k in range(min(settings.images, len(self.examples)))]
        prompts = settings.prompts or tuple(example["prompt"] for example in examples)
        jobs = [
            ConditionedJob(example["name"], prompts[k % len(prompts)], example["hint"])
            for k, example in enumerate(examples)
        ]
        pipeline = self.pipeline()
        with self.sampling_mode(self.base.unet, self.base.text_encoder, self.encoder):
            drawn = sample_conditioned(pipeline, jobs, settings.sampling, seed=settings.seed)
            images = [image for _, image in drawn]
        rows = [
            (f"{job.name}: {job.prompt}", [example["condition"], image, *filter(None, [example.get("image")])])
            for job, example, image in zip(jobs, examples, images, strict=True)
        ]
        save_png(sheet(rows), path, {"step": step, **settings.model_dump(mode="json")})
        return {f"{kind}_images": float(sum(fault(image) == kind for image in images)) for kind in ("black", "nan")}

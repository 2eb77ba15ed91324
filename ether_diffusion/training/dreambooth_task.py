"""DreamBooth as a task for the training loop: photos and class images -> noisy latents -> the UNet's loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ether_diffusion.adapters.attach import trainable_parameters
from ether_diffusion.adapters.loading import fill_adapter
from ether_diffusion.adapters.phases import TEXT_ENCODER
from ether_diffusion.adapters.storage import read_adapter, save_adapter
from ether_diffusion.data.photo_dataset import DreamBoothDataset, PixelsKey
from ether_diffusion.generation import fault, jobs_for, sample_images
from ether_diffusion.models.bases import Base
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.saved_modules import UNET, save_whole_module
from ether_diffusion.pictures import save_png, sheet

from .denoising import DenoisingTask, squared_errors
from .latent_cache import EncodedDataset, EncoderCache, pixels_of_run

if TYPE_CHECKING:
    from .dreambooth import DreamBoothConfig


class DenoisingLoss(nn.Module):
    """The UNet, the text encoder where it is trained too, and the loss: all that is trained, in one module.

    The mean squared error over instance samples, plus `prior_weight` times the one over class samples.
    """

    def __init__(self, unet: nn.Module, prior_weight: float, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.prior_weight = prior_weight

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        hidden = batch["encoder_hidden_states"]
        if self.text_encoder is not None:
            hidden = self.text_encoder(batch["input_ids"])[0].to(batch["noisy_latents"].dtype)
        prediction = self.unet(batch["noisy_latents"], batch["timesteps"], hidden).sample
        squares = squared_errors(prediction, batch["target"])  # (B, C, h, w)
        if batch["masks"] is not None:
            # Not divided by the mask's area: a crop with a sliver of white would weigh as much as a whole subject.
            squares = squares * batch["masks"]  # (B, 1, h, w)
        errors = squares.mean(dim=(1, 2, 3))  # (B,)
        errors = errors * batch["weights"]
        instance = errors[: batch["instances"]].mean()
        if batch["instances"] == len(errors):
            return {"loss": instance}
        prior = errors[batch["instances"] :].mean()
        return {"loss": instance + self.prior_weight * prior, "instance_loss": instance, "prior_loss": prior}


class DreamBoothTask(DenoisingTask):
    """Photos and class images -> noisy latents -> the UNet's loss."""

    config: DreamBoothConfig

    def __init__(
        self, config: DreamBoothConfig, base: Base, dataset: DreamBoothDataset, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, base, device, dtype, trains_text=config.adapter.text_encoder)
        self.source = dataset
        self.dataset: Dataset[dict[str, Any]] = dataset
        self.module: nn.Module = DenoisingLoss(
            base.unet,
            config.data.prior.weight if config.data.prior else 0.0,
            base.text_encoder if self.trains_text else None,
        )

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = [{"params": list(trainable_parameters(self.base.unet).values()), "lr": learning_rate}]
        if self.trains_text:
            groups.append({"params": list(trainable_parameters(self.base.text_encoder).values()), "lr": learning_rate})
        return groups

    def use_cache(self, root: Path, steps: int, samples_per_step: int, accelerator: Accelerator) -> None:
        """Encode all pictures and prompts of the run once, into `root`, and let the encoders go.

        Where validation needs them, they wait on the CPU.
        """
        vae, settings = self.base.vae, {"dtype": str(self.base.vae.dtype)}
        pictures = pixels_of_run(self.source, steps * samples_per_step)

        def encode(key: PixelsKey) -> dict[str, Tensor]:
            mean, deviation = self._encode(pictures[key]())
            return {"mean": mean, "deviation": deviation}

        with torch.no_grad():
            found = EncoderCache(root, "latents", vae, settings).fill(pictures, encode, accelerator)
            if not self.trains_text:
                labels = [self.source.labels(index) for index in range(steps * samples_per_step)]
                prompts = {label[name] for label in labels for name in ("prompt", "class_prompt") if name in label}
                text = EncoderCache(root, "text", self.base.text_encoder, settings)
                features = text.fill(
                    sorted(prompts), lambda prompt: {"features": self.encode_text(prompt)}, accelerator
                )
                self.features = {p: f["features"].to(self.device, self.dtype) for p, f in features.items()}
        self.dataset = EncodedDataset(self.source, {key: (f["mean"], f["deviation"]) for key, f in found.items()})
        encoders = [vae] if self.trains_text else [vae, self.base.text_encoder]
        self.offload_encoders(encoders, needed_for_sampling=bool(self.config.validation.prompts))

    @staticmethod  # workers that are spawned, as on macOS, are sent it: without the models
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Instances first, then as many class samples."""
        kind = "moments" if "moments" in samples[0] else "pixel_values"
        parts = ["", "class_"] if f"class_{kind}" in samples[0] else [""]
        batch: dict[str, Any] = {"instances": len(samples)}
        batch[kind] = [sample[part + kind] for part in parts for sample in samples]
        batch["prompts"] = [sample[part + "prompt"] for part in parts for sample in samples]
        batch["streams"] = [(part.rstrip("_") or "instance", sample["index"]) for part in parts for sample in samples]
        if "loss_weights" in samples[0]:
            masks = [sample["loss_weights"] for sample in samples]
            batch["masks"] = torch.stack([*masks, *(torch.ones_like(mask) for mask in masks * (len(parts) - 1))])
        return batch

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Noisy latents, targets, text features and masks, each a function of the sample alone."""
        moments = batch.get("moments") or [self._encode(pixels) for pixels in batch["pixel_values"]]
        noised, masks = self.noised(moments, batch["streams"]), batch.get("masks")
        shape = noised["target"].shape[-2:]
        return {
            **noised,
            **self.text(batch["prompts"]),
            "masks": None if masks is None else F.interpolate(masks.to(self.device), shape, mode="area"),
            "instances": batch["instances"],
        }

    def save(self, folder: Path, step: int) -> None:
        subjects = (self.config.data, *self.config.data.more_subjects)
        prompts = ", ".join(f"`{subject.instance_prompt}`" for subject in subjects)
        made_of: dict[str, Any] = {
            "base_model": self.config.base_model,
            "revision": self.config.revision,
            "vae": self.config.vae,
            "notes": {"instance prompt": prompts, "training steps": step, "seed": self.config.seed},
        }
        if self.config.trains_unet:
            save_whole_module(self.base.unet, folder / UNET.folder, UNET, **made_of)
            return
        save_adapter(
            self.base.unet,
            folder / "adapter",
            **made_of,
            text_encoder=self.base.text_encoder if self.trains_text else None,
        )

    def load(self, folder: Path) -> None:
        if self.config.trains_unet:
            fill_module(self.base.unet, folder / UNET.folder, UNET.what)
            return
        fill_adapter(self.base.unet, read_adapter(folder / "adapter"))
        if self.trains_text:
            fill_adapter(self.base.text_encoder, read_adapter(folder / "adapter" / TEXT_ENCODER))

    @torch.no_grad()
    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Draw every validation prompt into one grid. Counts those that are NaN, or black all over."""
        settings = self.config.validation
        jobs = jobs_for(settings.prompts, settings.images_per_prompt)
        resolution = self.config.data.resolution
        with self.sampling_mode(self.base.unet, self.base.text_encoder):
            drawn = sample_images(
                self.base.pipeline(), jobs, settings.sampling, seed=settings.seed, resolution=resolution
            )
            images = [image for _, image in drawn]
        n = settings.images_per_prompt
        rows = [(prompt, images[k * n : (k + 1) * n]) for k, prompt in enumerate(settings.prompts)]
        save_png(sheet(rows), path, {"step": step, **settings.model_dump(mode="json")})
        return {f"{kind}_images": float(sum(fault(image) == kind for image in images)) for kind in ("black", "nan")}

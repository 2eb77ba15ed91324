"""Controllable generation (paper section 5.1.2): pairs of image and condition -> a condition encoder and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ether_diffusion.adapters.attach import count_parameters
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.data.condition_kind import ConditionKind, save_condition_kind
from ether_diffusion.data.data_digests import pairs_digest
from ether_diffusion.data.other_worlds import pairs_note
from ether_diffusion.errors import UserError
from ether_diffusion.files import cache_folder
from ether_diffusion.generation import Job, sample_images
from ether_diffusion.models.bases import TINY, Base, check_takes_hints
from ether_diffusion.models.condition_encoder import (
    FOLDER,
    WHAT,
    build_condition_encoder,
    find_condition_encoder,
)
from ether_diffusion.models.conditioning import ConditionedUNet
from ether_diffusion.models.controllable_pipeline import PIPELINES
from ether_diffusion.models.controlnet import CONTROLNET_PIPELINES, ControlledUNet, build_controlnet
from ether_diffusion.models.module_files import fill_module, save_module
from ether_diffusion.models.saved_modules import CONTROLNET, save_whole_module

from .controllable_config import NAME, ControllableConfig, resolve
from .controllable_pairs import make_dataset, training_pairs, validation_pairs
from .diffusers_flags import hints
from .environment import to_device
from .latent_cache import EncodedSamples
from .objective import denoising_loss
from .run_folder import RunFolder
from .run_task import run_task
from .schedule import Plan
from .second_phase import previous_encoder
from .task import Report, Task, TrainingTask
from .training_base import read_initial, read_module, reload_in_fp32


def run(config: ControllableConfig, *, dry_run: bool = False) -> Report:
    """Train a condition encoder and an adapter, the encoder alone, or a ControlNet, as `run_task`."""
    kind = ControlNetTask if config.trains_controlnet else ControllableTask
    return run_task(kind, resolve(config), dry_run)


TASK = TrainingTask(
    name=NAME,
    config=ControllableConfig,
    resolve=resolve,
    run=run,
    hints=hints(NAME),
    why_alone="controllable runs do not train together: each trains a condition encoder of its own, a network of whole "
    "weights, which the samples of a batch would share. Train them one by one.",
)


class ControllableTask(Task[ControllableConfig]):
    """Images, hints and captions -> noisy latents -> the loss of the UNet that sees the hints."""

    encoder: Any
    """The condition encoder."""

    def __init__(self, config: ControllableConfig, previous: SavedAdapter | None, resumed: bool) -> None:
        super().__init__(config, previous, resumed)
        self.pairs = pairs = training_pairs(config)
        without = sum(pair.image is None for pair in pairs.pairs)
        if without:
            raise UserError(
                f"data.dataset_dir: {without:,} of {len(pairs):,} conditions in {pairs.folder} have no image."
            )
        self.dataset = make_dataset(config, pairs, config.data.caption_dropout)
        self.dataset.example(0)  # a data set that cannot be read at all is refused before a base is loaded
        shown, note = validation_pairs(config, pairs)
        self.examples = make_dataset(config, shown)
        self.samples_per_epoch = len(self.dataset)
        foreign = pairs_note(pairs) if config.base_model == TINY else None
        self.notes = [f"Note:    {line}" for line in (*pairs.notes, *filter(None, [note, foreign]))]
        self.facts = {"condition": f"{pairs.kind}, through the encoder in `{FOLDER}/` next to this folder"}

        self.encoder_source: Path | None = None
        """The saved encoder to start from."""
        if not resumed and config.adapter.init_from is not None:
            self.find_initial(config.adapter.init_from)
        if previous is not None:
            after: Path = config.adapter.after  # pyright: ignore[reportAttributeAccessIssue]
            self.encoder_source = previous_encoder(previous, after)

    def find_initial(self, source: Path) -> None:
        """Find the adapter and the encoder to start from. The run of another task has no encoder; a new one will do."""
        self.encoder_source = find_condition_encoder(source)
        if self.config.adapter.peft_type:
            self.initial = read_initial(self.config)
        elif self.encoder_source is None:
            raise UserError(
                f"adapter.init_from: {source} holds no {FOLDER}/; expected the folder of a controllable run."
            )

    def check_base(self, base: Base) -> None:
        check_takes_hints(base)
        super().check_base(base)

    def build(self, base: Base, plan: Plan, accelerator: Accelerator) -> None:
        super().build(base, plan, accelerator)
        self.dataset.frames = bool(base.family.conditioning_of_frames)
        self.encoder = self.build_encoder(base)
        if self.config.freezes_encoder:
            self.encoder.requires_grad_(False).eval()
        else:
            if self.config.training.gradient_checkpointing:
                self.encoder.enable_gradient_checkpointing()
            self.encoder.train()
        self.module = self.with_loss(base)

    def build_encoder(self, base: Base) -> Any:
        encoder = build_condition_encoder(base.denoiser, base.vae_factor, self.config.seed)
        if self.encoder_source is not None:
            fill_module(encoder, self.encoder_source, WHAT)
        return encoder

    def with_loss(self, base: Base) -> nn.Module:
        """UNet, encoder and loss: all that is trained, in one module."""
        return ConditionedLoss(base, self.encoder)

    def inputs(self) -> dict[str, str]:
        return {"data.dataset_dir": pairs_digest(self.pairs)}

    def texts(self) -> list[str]:
        return [pair.caption for pairs in (self.pairs, self.examples.pairs) for pair in pairs.pairs]

    def summary(self) -> list[str]:
        pairs = self.pairs
        kind = f"label maps of {len(pairs.palette) - 1} classes" if pairs.palette is not None else pairs.kind
        line = f'Pairs:   {len(pairs):,} in {pairs.folder}, split "{pairs.split}", conditions: {kind}'
        return [self.encoder_line(), line]

    def encoder_line(self) -> str:
        rate = self.config.training.encoder_learning_rate
        if rate is None:
            return f"Encoder: of {self.config.adapter.after}, frozen"  # pyright: ignore[reportAttributeAccessIssue]
        return f"Encoder: {count_parameters(self.encoder):,} trainable parameters, learning rate {rate:g}"

    def fill_caches(self, plan: Plan, accelerator: Accelerator) -> None:
        """Make the conditions that are made from images; encode the images, if the config says so."""
        with accelerator.main_process_first():
            self.dataset.prepare(device=str(accelerator.device), shown=accelerator.is_main_process)
        if self.config.data.cache:
            folder = self.config.data.cache_dir
            root = folder / "encoded" if folder else cache_folder("encoded")
            # An epoch shows each image once; only mirrored images can be new in later epochs.
            samples = plan.steps * plan.samples_per_step
            number = samples if self.config.data.horizontal_flip else min(samples, len(self.dataset))
            self.dataset = EncodedSamples(self.dataset)
            self.encoders.cache_latents(self.dataset, number, root, accelerator)
            self.encoders.offload(self.base.vae)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The adapter's, if there is one, and the encoder's at its own rate, unless it is frozen."""
        groups = super().parameter_groups(learning_rate)
        if self.config.freezes_encoder:
            return groups
        return [*groups, {"params": list(self.encoder.parameters()), "lr": self.config.training.encoder_learning_rate}]

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "moments" if "moments" in samples[0] else "pixel_values"
        frames = {"frames": [sample["frame"] for sample in samples]} if "frame" in samples[0] else {}
        return {
            **frames,
            kind: [sample[kind] for sample in samples],
            "hint": torch.stack([sample["hint"] for sample in samples]),
            "prompts": [sample["prompt"] for sample in samples],
            "streams": [("pair", sample["index"]) for sample in samples],
        }

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Noisy latents, targets and text features, each a function of the sample alone; hints as they are."""
        moments = batch.get("moments") or [self.encoders.moments(pixels) for pixels in batch["pixel_values"]]
        noised = self.noised(moments, batch["streams"])
        noised |= self.frames(batch.get("frames", ()))
        return {**noised, **self.text(batch["prompts"]), "hint": to_device(batch["hint"], self.device)}

    def save(self, folder: Path, step: int) -> None:
        save_module(self.encoder, folder / FOLDER, self.record())
        save_condition_kind(ConditionKind.of(self.pairs), folder / FOLDER)
        super().save(folder, step)

    def load(self, folder: Path) -> None:
        fill_module(self.encoder, folder / FOLDER, WHAT)
        super().load(folder)

    @torch.no_grad()
    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Generate an image for each example pair, and write rows: condition, sampled image, the pair's image."""
        settings = self.config.validation
        examples = [self.examples.example(k) for k in range(min(settings.images, len(self.examples)))]
        prompts = settings.prompts or tuple(example["prompt"] for example in examples)
        jobs = [
            Job(prompts[k % len(prompts)], condition=example["name"], hint=example["hint"])
            for k, example in enumerate(examples)
        ]
        pipeline = self.pipeline()
        with self.encoders.sampling_mode(self.base.denoiser, *self.base.text_encoders.values(), self.encoder):
            images = [image for _, image in sample_images(pipeline, jobs, settings.sampling, seed=settings.seed)]
        rows = [
            (f"{job.condition}: {job.prompt}", [example["condition"], image, *filter(None, [example.get("image")])])
            for job, example, image in zip(jobs, examples, images, strict=True)
        ]
        return self.save_sheet(rows, images, step, path)

    def pipeline(self) -> Any:
        """The pipeline for validation, made from the models in training."""
        return self.base.pipeline(PIPELINES[self.base.family.pipeline_class], condition_encoder=self.encoder)

    def results(self, folder: RunFolder) -> list[str]:
        return [*super().results(folder), f"Encoder: {folder.path / FOLDER}"]

    def example(self, folder: RunFolder) -> list[str]:
        split, output = self.examples.pairs.split, folder.path / "images"
        return ["--dataset", self.config.data.dataset_dir, "--split", split, "--output", str(output)]


class ControlNetTask(ControllableTask):
    """The same with a ControlNet (arXiv 2302.05543) as the encoder; the UNet stays as it is."""

    def find_initial(self, source: Path) -> None:
        self.encoder_source = read_module(source, CONTROLNET).folder

    def whole_weights(self, base: Base) -> int:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(base.denoiser.config)
            return count_parameters(build_controlnet(unet, base.vae_factor))

    def build_encoder(self, base: Base) -> Any:
        self.facts = {"condition": self.pairs.kind}
        encoder = build_controlnet(reload_in_fp32(self.config, base).denoiser, base.vae_factor, self.config.seed)
        if self.encoder_source is not None:
            fill_module(encoder, self.encoder_source, CONTROLNET.what)
        return encoder

    def with_loss(self, base: Base) -> nn.Module:
        return ControlNetLoss(base, self.encoder)

    def encoder_line(self) -> str:
        rate = self.config.training.learning_rate
        return f"ControlNet: {count_parameters(self.encoder):,} trainable parameters, learning rate {rate:g}"

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.encoder.parameters()), "lr": learning_rate}]

    def save(self, folder: Path, step: int) -> None:
        target = folder / CONTROLNET.folder
        save_whole_module(self.encoder, target, CONTROLNET, **self.origin(step), texts=self.record())
        save_condition_kind(ConditionKind.of(self.pairs), target)

    def load(self, folder: Path) -> None:
        fill_module(self.encoder, folder / CONTROLNET.folder, CONTROLNET.what)

    def pipeline(self) -> Any:
        return self.base.pipeline(CONTROLNET_PIPELINES[self.base.family.pipeline_class], controlnet=self.encoder)

    def results(self, folder: RunFolder) -> list[str]:
        return [f"ControlNet: {folder.path / CONTROLNET.folder}"]


class _HintedLoss(nn.Module):
    """Mixed into a UNet that sees hints: a batch's loss in place of its prediction."""

    def __init__(self, base: Base, encoder: Any) -> None:
        super().__init__(base.denoiser, encoder)
        self.family = base.family

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = {name: batch[name] for name in ("noisy_latents", "timesteps", "hint")}
        prediction = super().forward(**inputs, **self.family.unet_arguments(batch))
        return denoising_loss(prediction, batch["target"], batch["weights"])


class ConditionedLoss(_HintedLoss, ConditionedUNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The UNet, the condition encoder and the loss."""


class ControlNetLoss(_HintedLoss, ControlledUNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The UNet, the ControlNet and the loss."""

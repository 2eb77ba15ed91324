"""Subject-driven generation (DreamBooth, paper section 5.1): a few photos of a subject -> an adapter for its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.data.data_digests import photos_digest
from ether_diffusion.data.other_worlds import photos_note
from ether_diffusion.data.photo_dataset import DreamBoothDataset
from ether_diffusion.data.photos import Photo, find_photos
from ether_diffusion.data.sample_order import samples_per_epoch
from ether_diffusion.data.subjects import Subject, find_subject
from ether_diffusion.files import cache_folder, digest_of_json
from ether_diffusion.models.bases import TINY, Base

from . import many_runs
from .class_images import ClassImages, class_images
from .diffusers_flags import hints
from .dreambooth_config import NAME, DreamBoothConfig, resolve
from .environment import to_device
from .latent_cache import EncodedSamples
from .run_folder import RunFolder
from .run_task import run_task
from .schedule import Plan
from .second_phase import check_no_encoder
from .task import DenoisingLoss, Report, Task, TrainingTask
from .training_base import read_initial


def run(config: DreamBoothConfig, *, dry_run: bool = False) -> Report:
    """Train an adapter, or the whole UNet, on the photos of one subject or several, as `run_task`."""
    return run_task(DreamBoothTask, resolve(config), dry_run)


def run_many(
    configs: Sequence[DreamBoothConfig], *, dry_run: bool = False, max_together: int | None = None
) -> list[Report]:
    """Train adapters of several subjects, seeds or rates in shared passes, as `many_runs.run_many`."""
    resolved = [resolve(config) for config in configs]
    return many_runs.run_many(DreamBoothTask, resolved, dry_run=dry_run, max_together=max_together)


TASK = TrainingTask(name=NAME, config=DreamBoothConfig, resolve=resolve, run=run, hints=hints(NAME), run_many=run_many)


class DreamBoothTask(Task[DreamBoothConfig]):
    """Photos and class images -> noisy latents -> the loss of the UNet."""

    def __init__(self, config: DreamBoothConfig, previous: SavedAdapter | None, resumed: bool) -> None:
        super().__init__(config, previous, resumed)
        data = config.data
        self.subjects = [
            find_subject(
                subject.instance_dir,
                subject.instance_prompt or "",
                class_prompt=subject.class_prompt or "",
                captions=data.captions,
                masks=subject.masks,
            )
            for subject in config.subjects
        ]
        self.samples_per_epoch = samples_per_epoch(len(subject.photos.photos) for subject in self.subjects)
        self.notes = []
        for subject in self.subjects:
            self.notes += [f"Skipped: {name} ({reason})" for name, reason in subject.photos.skipped]
            self.notes += [f"Note:    {note}" for note in subject.notes]
        if config.base_model == TINY:
            foreign = (
                photos_note(one.photos.folder, {photo.size for photo in one.photos.photos}, settings.class_name)
                for one, settings in zip(self.subjects, config.subjects, strict=True)
            )
            self.notes += [f"Note:    {note}." for note in foreign if note][:1]
        if data.prior is not None and data.prior.class_dir is not None:
            own_class = find_photos(data.prior.class_dir)
            self.subjects = [replace(subject, class_folder=own_class) for subject in self.subjects]
        if previous is not None:
            check_no_encoder(config.adapter.after)  # pyright: ignore[reportAttributeAccessIssue]
        self.initial = None if resumed else read_initial(config)
        self.facts = {"instance prompt": ", ".join(f"`{subject.instance_prompt}`" for subject in config.subjects)}

    def use_base(self, base: Base, accelerator: Accelerator, dry_run: bool) -> None:
        """Generate the class images. In a dry run the photos stand in, so that time and memory are the run's."""
        prior = self.config.data.prior
        if prior is None or prior.class_dir is not None:
            return
        for k, subject in enumerate(self.subjects):
            images = subject.photos
            if not dry_run:
                wanted = ClassImages.of(self.config, subject.class_prompt)
                images = class_images(wanted, base, prior.cache_dir, accelerator)
            self.subjects[k] = replace(subject, class_folder=images)

    def build(self, base: Base, plan: Plan, accelerator: Accelerator) -> None:
        super().build(base, plan, accelerator)
        data = self.config.data
        self.dataset = DreamBoothDataset(
            self.subjects,
            resolution=data.resolution,
            crop=data.crop,
            horizontal_flip=data.horizontal_flip,
            seed=self.config.seed,
            crops_per_photo=data.crops_per_photo,
            bucket_factor=data.bucket_factor,
            group=plan.samples_per_step,
            caption_dropout=data.caption_dropout,
            frames=bool(base.family.conditioning_of_frames),
        )
        self.module = DenoisingLoss(base, self.trains_text, data.prior.weight if data.prior else 0.0)

    def inputs(self) -> dict[str, str]:
        def digest(subject: Subject) -> str:
            photos = [(photo.name, photo.digest) for photo in subject.photos.photos]
            masks = [(name, Photo(name, mask).digest) for name, mask in sorted((subject.masks or {}).items())]
            return digest_of_json([photos, masks, sorted(subject.captions.items())])

        first, *others = map(digest, self.subjects)
        found = {"data.instance_dir": first}
        if others:
            found["data.more_subjects"] = digest_of_json(others)
        prior, folder = self.config.data.prior, self.subjects[0].class_folder
        if prior is not None and prior.class_dir is not None and folder is not None:
            found["data.prior.class_dir"] = photos_digest(folder.photos)
        return found

    def texts(self) -> list[str]:
        subjects = [[each.instance_prompt, each.class_prompt, *each.captions.values()] for each in self.subjects]
        return [text for texts in (*subjects, self.config.validation.prompts) for text in texts]

    def summary(self) -> list[str]:
        prior, lines = self.config.data.prior, []
        for subject in self.subjects:
            photos, images = subject.photos, subject.class_folder
            lines.append(f'Photos:  {len(photos.photos)} in {photos.folder}, "{subject.instance_prompt}"')
            if prior is not None and images is photos:
                number = f'{prior.num_images} images of "{subject.class_prompt}"'
                lines.append(f"Prior:   {number} will be generated; the photos stand in for the dry run")
            elif images is not None:
                lines.append(f'Prior:   {len(images.photos)} images in {images.folder}, "{subject.class_prompt}"')
        return lines

    def fill_caches(self, plan: Plan, accelerator: Accelerator) -> None:
        """Encode all images and prompts of the run, if the config says so; the encoders are then offloaded."""
        if not self.config.data.cache:
            return
        root, number = self.config.data.cache_dir or cache_folder("encoded"), plan.steps * plan.samples_per_step
        labels = [self.dataset.without_pixels(index) for index in range(number)]
        self.dataset = EncodedSamples(self.dataset)
        self.encoders.cache_latents(self.dataset, number, root, accelerator)
        if self.trains_text:
            self.encoders.offload(self.base.vae)
        else:
            prompts = {label[name] for label in labels for name in ("prompt", "class_prompt") if name in label}
            self.encoders.cache_text(sorted(prompts), root, accelerator)
            self.encoders.offload(self.base.vae, *self.base.text_encoders.values())

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Instances first, then as many class samples."""
        kind = "moments" if "moments" in samples[0] else "pixel_values"
        parts = ["", "class_"] if f"class_{kind}" in samples[0] else [""]
        batch: dict[str, Any] = {"instances": len(samples)}
        batch[kind] = [sample[part + kind] for part in parts for sample in samples]
        batch["prompts"] = [sample[part + "prompt"] for part in parts for sample in samples]
        batch["streams"] = [(part.rstrip("_") or "instance", sample["index"]) for part in parts for sample in samples]
        if "frame" in samples[0]:
            batch["frames"] = [sample[part + "frame"] for part in parts for sample in samples]
        if "loss_weights" in samples[0]:
            masks = [sample["loss_weights"] for sample in samples]
            batch["masks"] = torch.stack([*masks, *(torch.ones_like(mask) for mask in masks * (len(parts) - 1))])
        return batch

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Noisy latents, targets, text features and masks, each a function of the sample alone."""
        moments = batch.get("moments") or [self.encoders.moments(pixels) for pixels in batch["pixel_values"]]
        prepared = {**self.noised(moments, batch["streams"]), **self.text(batch["prompts"])}
        prepared |= self.frames(batch.get("frames", ()))
        masks, shape = batch.get("masks"), prepared["target"].shape[-2:]
        prepared["masks"] = None if masks is None else F.interpolate(to_device(masks, self.device), shape, mode="area")
        return {**prepared, "instances": batch["instances"]}

    def example(self, folder: RunFolder) -> list[str]:
        config = self.config
        place = "in the snow" if config.base_model == TINY else "in the jungle"  # the miniature has no jungle
        prompt = f"a {config.data.identifier} {config.data.class_name} {place}"
        return ["--prompt", (*config.validation.prompts, prompt)[0], "--output", str(folder.path / "images")]

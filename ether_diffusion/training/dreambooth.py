"""Subject-driven generation (DreamBooth, paper section 5.1): a few photos of a subject -> an adapter that draws it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ether_diffusion.adapters.method_settings import learning_rate
from ether_diffusion.adapters.methods import AdapterSettings, EtherPlusSettings
from ether_diffusion.adapters.storage import SavedAdapter, read_adapter
from ether_diffusion.adapters.whole_module_methods import FullSettings
from ether_diffusion.config import Settings
from ether_diffusion.data.caches import cache_folder
from ether_diffusion.data.photo_dataset import DreamBoothDataset, dreambooth_prompts
from ether_diffusion.data.photos import find_photos
from ether_diffusion.data.subjects import Subject, find_subject
from ether_diffusion.data.turns import samples_an_epoch
from ether_diffusion.generation import Sampling
from ether_diffusion.models.bases import TINY, Base
from ether_diffusion.models.quantized import number_of_weights
from ether_diffusion.models.saved_modules import UNET, SavedModule

from . import start
from .class_images import ClassImages, class_images
from .config import TaskConfig
from .dreambooth_task import DreamBoothTask
from .loop import Report, Trainer
from .resuming import resumes
from .schedule import make_plan
from .second_phase import check_no_encoder, check_previous, find_previous, merge_previous
from .settings import ValidationSettings

TASK = "dreambooth"


class PriorSettings(Settings):
    """Prior preservation: images of other members of the class keep the class from collapsing into the subject."""

    weight: NonNegativeFloat = 1.0
    num_images: PositiveInt = 200
    class_dir: Path | None = None
    """A folder of your own class images; null: they are drawn by the base model, once, into `cache_dir`."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/class_images`, a folder for every base, prompt, seed and sampler."""
    seed: int = 0
    sampling: Sampling = Sampling()


class SubjectSettings(Settings):
    """One subject."""

    instance_dir: str
    """A folder with 3 to 6 photos of the subject."""
    class_name: str = Field(min_length=1)
    """What the subject is one of, as in `a photo of qwe {class_name}`: dog, backpack, toy …"""
    identifier: str = Field(default="qwe", min_length=1)
    """A rare word that comes to mean the subject."""
    instance_prompt: str | None = None
    """Default: `a photo of {identifier} {class_name}`."""
    class_prompt: str | None = None
    """Default: `a photo of {class_name}`."""
    masks: Path | None = None
    """A folder of grey masks of the photos' names: white counts in the loss, black does not."""

    def resolved(self) -> SubjectSettings:
        """With its prompts filled in."""
        instance, of_class = dreambooth_prompts(self.identifier, self.class_name)
        return SubjectSettings(
            instance_dir=self.instance_dir,
            class_name=self.class_name,
            identifier=self.identifier,
            instance_prompt=self.instance_prompt or instance,
            class_prompt=self.class_prompt or of_class,
            masks=self.masks,
        )


class DataSettings(SubjectSettings):
    """The subject, and how samples are made of it."""

    more_subjects: tuple[SubjectSettings, ...] = ()
    """Other subjects, to be learned in the same run, each with an identifier of its own."""
    resolution: PositiveInt = 512
    """Side of the square crops in pixels; a multiple of 8."""
    crop: Literal["random", "center", "bucket"] = "random"
    """Squares at random places or in the centre; or, `bucket`, the shape nearest to each photo's, hardly cropped."""
    bucket_factor: PositiveInt = 64
    """Sides of buckets are multiples of this; their area is at most resolution squared."""
    crops_per_photo: PositiveInt | None = None
    """With random crops: at this many fixed places a photo, so that they can be cached; null: anywhere."""
    horizontal_flip: bool = False
    captions: bool = False
    """Take a photo's prompt from the text file of its name, `IMG_1.txt` beside `IMG_1.jpg`, where there is one."""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a sample's prompt is empty."""
    cache: bool = False
    """Encode pictures and prompts once, onto the disk; VAE and text encoder then leave memory. Needs fixed crops."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/encoded`."""
    prior: PriorSettings | None = PriorSettings()
    """null: no prior preservation."""


class DreamBoothConfig(TaskConfig):
    """Everything that a DreamBooth run depends on."""

    adapter: AdapterSettings = EtherPlusSettings()
    data: DataSettings
    validation: ValidationSettings = ValidationSettings()

    @model_validator(mode="after")
    def _cache_needs_fixed_crops(self) -> DreamBoothConfig:
        if self.data.cache and self.data.crop == "random" and self.data.crops_per_photo is None:
            raise ValueError("data.cache needs fixed crops: data.crops_per_photo=8, or data.crop=center or bucket")
        return self

    @model_validator(mode="after")
    def _full_needs_its_weights(self) -> DreamBoothConfig:
        if self.trains_unet and self.quantization is not None:
            raise ValueError(f"quantization: {self.quantization}, but adapter.method: full trains those weights")
        return self

    @property
    def trains_unet(self) -> bool:
        """The whole UNet is trained, in the place of an adapter in it."""
        return isinstance(self.adapter, FullSettings)

    @model_validator(mode="after")
    def _subjects_differ(self) -> DreamBoothConfig:
        subjects = [self.data, *self.data.more_subjects]
        names = [(subject.identifier, subject.class_name) for subject in subjects]
        if len(set(names)) < len(names):
            raise ValueError("data.more_subjects: two share identifier and class_name; give each its own identifier")
        if self.data.more_subjects and self.data.prior is not None and self.data.prior.class_dir is not None:
            raise ValueError("data.prior.class_dir holds images of one class; with more_subjects they are drawn")
        return self


def resolve(config: DreamBoothConfig) -> DreamBoothConfig:
    """Fill in what defaults to something that depends on the rest: the learning rate and the prompts."""
    training, rate = config.training, learning_rate(config.adapter, TASK)
    if training.learning_rate is None:
        rate = 1.0 if training.optimizer == "prodigy" else rate
        training = training.model_copy(update={"learning_rate": rate})
    first = config.data.resolved()
    training = start.with_checkpoints_to_keep(config.adapter, training)
    prompts = {"instance_prompt": first.instance_prompt, "class_prompt": first.class_prompt}
    others = tuple(subject.resolved() for subject in config.data.more_subjects)
    data = config.data.model_copy(update={**prompts, "more_subjects": others})
    return config.model_copy(update={"training": training, "data": data})


def run(config: DreamBoothConfig, *, dry_run: bool = False) -> Report:
    """Train an adapter as the config says; into `output_dir`, or, dry, for one step and into nothing.

    Raises:
        UserError: the data, the base or the run folder is at fault; nothing has been written then.
    """
    config = resolve(config)
    folder = start.check_run(config, dry_run)
    data = config.data
    subjects = [
        find_subject(
            subject.instance_dir,
            subject.instance_prompt or "",
            class_prompt=subject.class_prompt or "",
            captions=data.captions,
            masks=subject.masks,
        )
        for subject in (data, *data.more_subjects)
    ]
    config, before = find_previous(config, folder)
    if before is not None:
        check_no_encoder(config.adapter.after)  # pyright: ignore[reportAttributeAccessIssue]
    own_class = find_photos(data.prior.class_dir) if data.prior and data.prior.class_dir else None
    # A run that goes on has its weights in its checkpoint, whatever has become of those that it began with.
    warm_start = None if resumes(folder.checkpoints, config.training.resume) else _warm_start(config)

    accelerator = start.start_accelerator(config, folder, dry_run)
    base = start.start_base(config, accelerator)
    check_previous(base, before)
    start.try_adapter(config, base, warm_start)
    samples = samples_an_epoch(len(subject.photos.photos) for subject in subjects)
    plan = make_plan(config.training, samples, accelerator.num_processes, accelerator.process_index)
    if config.trains_unet:
        start.print_disk(config, plan, number_of_weights(base.unet), None if dry_run else folder, accelerator)

    if own_class is not None:
        subjects = [replace(subject, class_folder=own_class) for subject in subjects]
    elif data.prior is not None:
        subjects = [_with_class_images(subject, config, data.prior, base, accelerator, dry_run) for subject in subjects]
    if config.trains_unet:  # class images are every method's: they are drawn in the precision of training
        base = start.reload_in_fp32(config, base)
    merge_previous(base, before)
    matched = start.attach_adapter(config, base, warm_start)

    dataset = DreamBoothDataset(
        subjects,
        resolution=data.resolution,
        crop=data.crop,
        horizontal_flip=data.horizontal_flip,
        seed=config.seed,
        crops_per_photo=data.crops_per_photo,
        bucket_factor=data.bucket_factor,
        group=plan.samples_per_step,
        caption_dropout=data.caption_dropout,
    )
    _print_run_summary(config, base, subjects, matched, accelerator, dry_run)
    start.print_plan(plan, accelerator)
    task = DreamBoothTask(config, base, dataset, accelerator.device, start.precision(accelerator))
    if data.cache and not dry_run:
        task.use_cache(data.cache_dir or cache_folder("encoded"), plan.steps, plan.samples_per_step, accelerator)
    trainer = Trainer(
        task,
        config.training,
        accelerator,
        plan=plan,
        config=config,
        seed=config.seed,
        run=None if dry_run else folder,
        validate_every=config.validation.every if config.validation.prompts else None,
    )
    report = trainer.train()
    command = ["ether-diffusion", "generate", "--adapter", str(folder.path), "--prompt", _example_prompt(config)]
    draw = f"Draw:    {shlex.join(command)}"
    result = f"UNet:    {folder.path / UNET.folder}" if config.trains_unet else f"Adapter: {folder.adapter}"
    start.print_result(report, [result, draw], dry_run, accelerator)
    return report


def _warm_start(config: DreamBoothConfig) -> SavedAdapter | SavedModule | None:
    source = config.adapter.init_from
    if source is None:
        return None
    return start.read_module(source, UNET) if config.trains_unet else read_adapter(source)


def _with_class_images(
    subject: Subject,
    config: DreamBoothConfig,
    prior: PriorSettings,
    base: Base,
    accelerator: Accelerator,
    dry_run: bool,
) -> Subject:
    if dry_run:  # a trial draws nothing: the photos stand in, so that time and memory are those of the run
        return replace(subject, class_folder=subject.photos)
    wanted = ClassImages(
        base_model=config.base_model,
        prompt=subject.class_prompt,
        num_images=prior.num_images,
        resolution=config.data.resolution,
        seed=prior.seed,
        sampling=prior.sampling,
    )
    return replace(subject, class_folder=class_images(wanted, base, prior.cache_dir, accelerator))


def _print_run_summary(
    config: DreamBoothConfig,
    base: Base,
    subjects: list[Subject],
    matched: list[str],
    accelerator: Accelerator,
    dry_run: bool,
) -> None:
    """What is about to be trained, and on what."""
    say = accelerator.print
    for note in base.notes:
        say(f"Note:    {note}")
    for subject in subjects:
        for name, reason in subject.photos.skipped:
            say(f"Skipped: {name} ({reason})")
        for note in subject.notes:
            say(f"Note:    {note}")
    start.print_base(config, base, accelerator)
    start.print_adapter(config, base, matched, accelerator)
    prior = config.data.prior
    for subject in subjects:
        say(f'Photos:  {len(subject.photos.photos)} in {subject.photos.folder}, "{subject.instance_prompt}"')
        if prior is not None and prior.class_dir is None and dry_run:
            say(f'Prior:   {prior.num_images} images of "{subject.class_prompt}" will be drawn; the photos stand in')
        elif subject.class_folder is not None:
            images = subject.class_folder
            say(f'Prior:   {len(images.photos)} images in {images.folder}, "{subject.class_prompt}"')


def _example_prompt(config: DreamBoothConfig) -> str:
    prompts = config.validation.prompts
    place = "in the snow" if config.base_model == TINY else "in the jungle"  # the miniature has no jungle
    return prompts[0] if prompts else f"a {config.data.identifier} {config.data.class_name} {place}"

"""Subject-driven generation (DreamBooth, paper section 5.1): a few photos of a subject -> an adapter that draws it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ether_diffusion.adapters.attach import attach, count_parameters, weightless_copy
from ether_diffusion.adapters.methods import METHODS, AdapterSettings, EtherPlusSettings
from ether_diffusion.adapters.storage import TEXT_ENCODER, check_same_tensors, fill_adapter, read_adapter
from ether_diffusion.config import Settings
from ether_diffusion.data.dreambooth import DreamBoothDataset, dreambooth_prompts
from ether_diffusion.data.photos import PhotoFolder, find_photos
from ether_diffusion.data.subjects import Subject, find_subject
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling
from ether_diffusion.models.bases import DEFAULT_BASE, TINY, Base, check_base, check_resolution, load_base, move

from .class_images import ClassImages, cache_folder, class_images
from .dreambooth_task import DreamBoothTask
from .environment import set_threads
from .loop import Report, Trainer
from .plan import make_plan
from .run import RunFolder
from .settings import TrainingSettings, ValidationSettings

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


class DataSettings(Settings):
    """The subject."""

    instance_dir: str
    """A folder with 3 to 6 photos of the subject."""
    class_name: str = Field(min_length=1)
    """What the subject is one of, as in `a photo of qwe {class_name}`: dog, backpack, toy …"""
    identifier: str = Field("qwe", min_length=1)
    """A rare word that comes to mean the subject."""
    instance_prompt: str | None = None
    """Default: `a photo of {identifier} {class_name}`."""
    class_prompt: str | None = None
    """Default: `a photo of {class_name}`."""
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
    masks: Path | None = None
    """A folder of grey masks of the photos' names: white counts in the loss, black does not."""
    cache: bool = False
    """Encode pictures and prompts once, onto the disk; VAE and text encoder then leave memory. Needs fixed crops."""
    cache_dir: Path | None = None
    """Default: `~/.cache/ether_diffusion/encoded`."""
    prior: PriorSettings | None = PriorSettings()
    """null: no prior preservation."""


class DreamBoothConfig(Settings):
    """Everything that a DreamBooth run depends on."""

    base_model: str = DEFAULT_BASE
    """A hub name, a folder in diffusers' layout, or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    output_dir: Path
    seed: int = 0
    adapter: AdapterSettings = EtherPlusSettings()
    data: DataSettings
    training: TrainingSettings
    validation: ValidationSettings = ValidationSettings()

    @model_validator(mode="after")
    def _cache_needs_fixed_crops(self) -> DreamBoothConfig:
        if self.data.cache and self.data.crop == "random" and self.data.crops_per_photo is None:
            raise ValueError("data.cache needs fixed crops: data.crops_per_photo=8, or data.crop=center or bucket")
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> DreamBoothConfig:
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError("training: give either steps or epochs; the other one is null, as in training.steps=null")
        return self


def resolve(config: DreamBoothConfig) -> DreamBoothConfig:
    """Fill in what defaults to something that depends on the rest: the learning rate and the prompts."""
    training = config.training
    if training.learning_rate is None:
        rate = METHODS[config.adapter.method].learning_rates[TASK]
        rate = 1.0 if training.optimizer == "prodigy" else rate
        training = training.model_copy(update={"learning_rate": rate})
    instance, of_class = dreambooth_prompts(config.data.identifier, config.data.class_name)
    data = config.data.model_copy(
        update={
            "instance_prompt": config.data.instance_prompt or instance,
            "class_prompt": config.data.class_prompt or of_class,
        }
    )
    return config.model_copy(update={"training": training, "data": data})


def run(config: DreamBoothConfig, *, dry_run: bool = False) -> Report:
    """Train an adapter as the config says; into `output_dir`, or, dry, for one step and into nothing.

    Raises:
        UserError: the data, the base or the run folder is at fault; nothing has been written then.
    """
    config = resolve(config)
    folder = RunFolder(config.output_dir)
    if not dry_run:
        folder.check_free(resume=bool(config.training.resume))
    check_base(config.base_model)
    data = config.data
    subject = find_subject(data.instance_dir, data.instance_prompt or "", captions=data.captions, masks=data.masks)
    photos = subject.photos
    own_class = _own_class_images(config)
    warm_start = read_adapter(config.adapter.init_from) if config.adapter.init_from else None

    tracker = config.training.tracker if not dry_run and config.training.tracker != "none" else None
    if tracker == "wandb":
        _require_wandb()
    set_threads()
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision, log_with=tracker, project_dir=str(folder.logs)
    )
    say = accelerator.print
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    base = load_base(config.base_model, revision=config.revision)
    check_resolution(config.data.resolution, base, "data.resolution")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"base_model: predicts {base.prediction_type!r}; supported: epsilon, v_prediction.")
    trial = weightless_copy(base.unet)  # what cannot be attached is refused before class images are drawn
    attach(trial, config.adapter)
    if config.adapter.text_encoder:
        attach(weightless_copy(base.text_encoder), config.adapter.for_text_encoder())
    if warm_start is not None:
        check_same_tensors(trial, warm_start)
    move(base.unet, dtype)

    class_folder = own_class or _drawn_class_images(config, base, accelerator, dry_run)
    matched = attach(base.unet, config.adapter, config.seed)
    if warm_start is not None:
        fill_adapter(base.unet, warm_start)
    if config.training.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()
    if config.adapter.text_encoder:
        matched += attach(base.text_encoder, config.adapter.for_text_encoder(), config.seed)
        if warm_start is not None:
            fill_adapter(base.text_encoder, read_adapter(warm_start.folder / TEXT_ENCODER))
        if config.training.gradient_checkpointing:
            base.text_encoder.gradient_checkpointing_enable()
        base.text_encoder.train()

    plan = make_plan(config.training, len(photos.photos), accelerator.num_processes)
    dataset = DreamBoothDataset(
        [replace(subject, class_folder=class_folder, class_prompt=data.class_prompt or "")],
        resolution=data.resolution,
        crop=data.crop,
        horizontal_flip=data.horizontal_flip,
        seed=config.seed,
        crops_per_photo=data.crops_per_photo,
        bucket_factor=data.bucket_factor,
        group=plan.samples_per_step,
        caption_dropout=data.caption_dropout,
    )
    _introduce(config, base, subject, class_folder, matched, accelerator, dry_run)
    task = DreamBoothTask(config, base, dataset, accelerator.device, dtype)
    if data.cache and not dry_run:
        task.use_cache(data.cache_dir or cache_folder("encoded"), plan.steps, plan.samples_per_step, accelerator)
    trainer = Trainer(
        task,
        config.training,
        accelerator,
        config=config,
        seed=config.seed,
        run=None if dry_run else folder,
        validate_every=config.validation.every if config.validation.prompts else None,
    )
    report = trainer.train()
    pace = f"{report.seconds_per_step:.2f} s a step, peak memory {report.peak_memory / 2**30:.2f} GiB"
    if dry_run:
        say(f"Dry run: {pace}. Nothing was written.")
    else:
        say(f"Adapter: {folder.adapter} ({pace if report.steps_taken else 'all steps were taken before'})")
        say(f'Draw:    ether-diffusion generate --adapter {folder.path} --prompt "{_example_prompt(config)}"')
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """`train_dreambooth.py`, and the module that `accelerate launch -m` takes from an installed wheel."""
    import ether_diffusion_cli

    return ether_diffusion_cli.main(["train", TASK, *(sys.argv[1:] if argv is None else argv)])


def _own_class_images(config: DreamBoothConfig) -> PhotoFolder | None:
    prior = config.data.prior
    return find_photos(prior.class_dir) if prior is not None and prior.class_dir is not None else None


def _drawn_class_images(
    config: DreamBoothConfig, base: Base, accelerator: Accelerator, dry_run: bool
) -> PhotoFolder | None:
    prior = config.data.prior
    if prior is None or prior.class_dir is not None:
        return None
    wanted = ClassImages(
        base_model=config.base_model,
        prompt=config.data.class_prompt or "",
        num_images=prior.num_images,
        resolution=config.data.resolution,
        seed=prior.seed,
        sampling=prior.sampling,
    )
    if dry_run:  # a trial draws nothing: the photos stand in, so that time and memory are those of the run
        return find_photos(config.data.instance_dir)
    return class_images(wanted, base, prior.cache_dir, accelerator)


def _introduce(
    config: DreamBoothConfig,
    base: Base,
    subject: Subject,
    class_folder: PhotoFolder | None,
    matched: list[str],
    accelerator: Accelerator,
    dry_run: bool,
) -> None:
    """What is about to be trained, on what, for how long."""
    say, training, photos = accelerator.print, config.training, subject.photos
    plan = make_plan(training, len(photos.photos), accelerator.num_processes)
    for name, reason in photos.skipped:
        say(f"Skipped: {name} ({reason})")
    for note in subject.notes:
        say(f"Note:    {note}")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    trained = count_parameters(base.unet) + count_parameters(base.text_encoder)
    frozen = sum(p.numel() for p in base.unet.parameters() if not p.requires_grad)
    random = " (random weights: expect noise, not pictures)" if base.name == TINY else ""
    say(f"Base:    {base.name}{random}, {frozen / 1e6:,.1f}M parameters in the UNet, {precision} precision")
    say(
        f"Adapter: {type(config.adapter).title}, {trained:,} trainable parameters in {len(matched)} layers, "
        f"learning rate {training.learning_rate:g}"
    )
    say(f'Photos:  {len(photos.photos)} in {photos.folder}, "{config.data.instance_prompt}"')
    prior = config.data.prior
    if prior is not None and prior.class_dir is None and dry_run:
        say(f'Prior:   {prior.num_images} images of "{config.data.class_prompt}" will be drawn; the photos stand in')
    elif class_folder is not None:
        say(f'Prior:   {len(class_folder.photos)} images in {class_folder.folder}, "{config.data.class_prompt}"')
    samples = f"{plan.samples_per_step} sample{'s' * (plan.samples_per_step > 1)}"
    say(f"Steps:   {plan.steps:,} with {samples} each, on {accelerator.device}")


def _example_prompt(config: DreamBoothConfig) -> str:
    prompts = config.validation.prompts
    return prompts[0] if prompts else f"a {config.data.identifier} {config.data.class_name} in the jungle"


def _require_wandb() -> None:
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("training.tracker: wandb is not installed: pip install 'ether-diffusion[tracking]'.") from None


if __name__ == "__main__":
    sys.exit(main())

"""Controllable generation (paper section 5.1.2): pairs of image and condition -> an encoder and an adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from ether_diffusion.adapters.attach import count_parameters
from ether_diffusion.adapters.method_settings import learning_rate
from ether_diffusion.adapters.methods import AdapterSettings, EtherPlusSettings
from ether_diffusion.adapters.storage import SavedAdapter, read_adapter
from ether_diffusion.adapters.whole_module_methods import ControlNetSettings
from ether_diffusion.config import Settings
from ether_diffusion.data.builtin import SCENES
from ether_diffusion.data.caches import cache_folder
from ether_diffusion.data.pair_captions import captions_of_split
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import find_layout
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.errors import UserError
from ether_diffusion.generation import ControllableSampling
from ether_diffusion.models.bases import Base
from ether_diffusion.models.condition_encoder import (
    FOLDER,
    build_condition_encoder,
    fill_condition_encoder,
    find_condition_encoder,
)
from ether_diffusion.models.controlnet import build_controlnet
from ether_diffusion.models.module_files import fill_module
from ether_diffusion.models.saved_modules import CONTROLNET

from . import start
from .config import TaskConfig
from .controllable_task import ControllableTask
from .controlnet_task import ControlNetTask
from .loop import Report, Trainer
from .resuming import resumes
from .schedule import make_plan
from .second_phase import check_previous, find_previous, merge_previous, previous_encoder
from .settings import TrainingSettings

TASK = "controllable"
TARGET = "attention+geglu"
"""The paper's: q, k, v, output projection "and the subsequent feed-forward layer"."""
"""The paper's bound on the encoder's learning rate: min(the adapter's, this)."""


class DataSettings(Settings):
    """The pairs, and how samples are made of them."""

    dataset_dir: str
    """ADEChallengeData2016, a folder of pairs or of photos, or `builtin:scenes`: see docs/controllable.md."""
    split: str = "training"
    condition: str = "auto"
    """`labels`, `image`, or a preprocessor that makes conditions of the images: `canny`, `hed`, … `auto`: look."""
    captions: Path | None = None
    """JSON lines, or a folder of text files; null: what the data set has."""
    caption_template: str | None = None
    """For images without a caption: `a photo of a {scene}`."""
    limit: PositiveInt | None = None
    """Only so many pairs, the first by name."""
    resolution: PositiveInt = 512
    """Side of the square crops in pixels; a multiple of 8."""
    crop: Literal["center", "random"] = "center"
    horizontal_flip: bool = False
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a sample's prompt is empty, for guidance. Its condition stays."""
    cache: bool = False
    """Encode the images once, onto the disk; the VAE then leaves memory. Needs `crop: center`."""
    cache_dir: Path | None = None
    """Where `builtin:scenes`, conditions made of images and encoded images are kept; default:
    `~/.cache/ether_diffusion`."""


class ControllableTrainingSettings(TrainingSettings):
    """Optimisation, precision, checkpoints."""

    encoder_learning_rate: NonNegativeFloat | None = None
    """The condition encoder's. Default: `learning_rate`, but at most the following."""
    max_encoder_learning_rate: PositiveFloat = 1e-4
    """The bound of that default. The paper's; runs a hundred times as short as its own want more."""


class ControllableValidationSettings(Settings):
    """Images drawn while training, under the conditions of some pairs, always from the same seeds."""

    images: NonNegativeInt = 4
    """How many pairs, the first by name; 0: none."""
    split: str | None = None
    """Whose pairs. Default: `validation`, where the data set has it, else those trained on."""
    captions: Path | None = None
    """Of that split, as `data.captions`; null: what the data set has."""
    prompts: tuple[str, ...] = ()
    """In the place of the pairs' own captions, in turn."""
    every: PositiveInt = 200
    """Steps between validations. The first one is before training, the last one after it."""
    seed: int = 0
    sampling: ControllableSampling = ControllableSampling()


class ControllableConfig(TaskConfig):
    """Everything that a controllable run depends on."""

    adapter: AdapterSettings = EtherPlusSettings(target=TARGET)
    """With `method: none` the condition encoder alone is trained; with `controlnet`, a ControlNet in its place."""
    data: DataSettings
    training: ControllableTrainingSettings  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    validation: ControllableValidationSettings = ControllableValidationSettings()

    @model_validator(mode="after")
    def _no_text_encoder(self) -> ControllableConfig:
        if self.adapter.text_encoder:
            raise ValueError("adapter.text_encoder: true, but a controllable run leaves the text encoder as it is")
        return self

    @model_validator(mode="after")
    def _cache_needs_fixed_crops(self) -> ControllableConfig:
        if self.data.cache and self.data.crop == "random":
            raise ValueError("data.cache: true, but crops at random places are never the same; take data.crop=center")
        return self

    @model_validator(mode="after")
    def _one_rate_for_prodigy(self) -> ControllableConfig:
        training = self.training
        if training.optimizer == "prodigy" and training.encoder_learning_rate not in (None, training.learning_rate):
            raise ValueError("training.encoder_learning_rate: prodigy finds one rate for all; leave it out")
        return self

    @model_validator(mode="after")
    def _one_rate_for_a_controlnet(self) -> ControllableConfig:
        if self.trains_controlnet and self.training.encoder_learning_rate is not None:
            raise ValueError("training.encoder_learning_rate: a ControlNet has one rate for all of it; leave it out")
        return self

    @model_validator(mode="after")
    def _no_rate_for_a_frozen_encoder(self) -> ControllableConfig:
        if self.freezes_encoder and self.training.encoder_learning_rate is not None:
            raise ValueError("training.encoder_learning_rate: adapter.after freezes the encoder; leave it out")
        return self

    @property
    def freezes_encoder(self) -> bool:
        """The condition encoder is the one of the run before, and stays as it is."""
        return getattr(self.adapter, "after", None) is not None

    @property
    def trains_controlnet(self) -> bool:
        """A ControlNet is trained in the place of a condition encoder and an adapter."""
        return isinstance(self.adapter, ControlNetSettings)


def resolve(config: ControllableConfig) -> ControllableConfig:
    """Fill in what defaults to something that depends on the rest: learning rates and the adapter's target."""
    training, adapter = config.training, config.adapter
    prodigy = training.optimizer == "prodigy"
    controlnet = config.trains_controlnet
    given = config.freezes_encoder or "target" in adapter.model_fields_set
    if adapter.peft_type and not given:
        adapter = adapter.model_copy(update={"target": TARGET})
    rate, encoder_rate, default = training.learning_rate, training.encoder_learning_rate, learning_rate(adapter, TASK)
    if rate is None:
        rate = 1.0 if prodigy else default
    if encoder_rate is None and not controlnet and not config.freezes_encoder:
        encoder_rate = rate if prodigy else min(rate, training.max_encoder_learning_rate)
    training = training.model_copy(update={"learning_rate": rate, "encoder_learning_rate": encoder_rate})
    training = start.with_checkpoints_to_keep(adapter, training)
    return config.model_copy(update={"training": training, "adapter": adapter})


def run(config: ControllableConfig, *, dry_run: bool = False) -> Report:
    """Train a condition encoder, and an adapter with it; into `output_dir`, or, dry, for one step and into nothing.

    Raises:
        UserError: the data, the base or the run folder is at fault; nothing has been written there then.
    """
    config = resolve(config)
    folder = start.check_run(config, dry_run)
    pairs = training_pairs(config)
    without = sum(pair.image is None for pair in pairs.pairs)
    if without:
        raise UserError(f"data.dataset_dir: {without:,} of {len(pairs):,} conditions in {pairs.folder} have no image.")
    config, before = find_previous(config, folder)
    # A run that goes on has its weights in its checkpoint, whatever has become of those that it began with.
    resumed = resumes(folder.checkpoints, config.training.resume)
    warm_adapter, warm_encoder = (None, None) if resumed else _warm_start(config)
    if before is not None:
        warm_encoder = previous_encoder(before, config.adapter.after)  # pyright: ignore[reportAttributeAccessIssue]
    dataset = _dataset(config, pairs, caption_dropout=config.data.caption_dropout)
    dataset.example(0)  # a data set that cannot be read at all is told before a base is loaded
    shown, note = _validation_pairs(config, pairs)
    examples = _dataset(config, shown)

    accelerator = start.start_accelerator(config, folder, dry_run)
    base = start.start_base(config, accelerator)
    if not config.adapter.peft_type:
        matched = []
        start.train_mode(config, base)
    else:
        check_previous(base, before)
        start.try_adapter(config, base, warm_adapter)
        merge_previous(base, before)
        matched = start.attach_adapter(config, base, warm_adapter)
    encoder = (_controlnet if config.trains_controlnet else _encoder)(config, base, warm_encoder)

    plan = make_plan(config.training, len(dataset), accelerator.num_processes, accelerator.process_index)
    _print_run_summary(config, base, pairs, note, encoder, matched, accelerator)
    start.print_plan(plan, accelerator)
    if config.trains_controlnet:
        start.print_disk(config, plan, count_parameters(encoder), None if dry_run else folder, accelerator)
    if not dry_run:  # conditions that are made of images: all of them once, where the model that makes them runs fast
        with accelerator.main_process_first():
            dataset.prepare(device=str(accelerator.device), shown=accelerator.is_main_process)
    kind = ControlNetTask if config.trains_controlnet else ControllableTask
    task = kind(config, base, encoder, dataset, examples, accelerator.device, start.precision(accelerator))
    if config.data.cache and not dry_run:
        root = config.data.cache_dir / "encoded" if config.data.cache_dir else cache_folder("encoded")
        task.use_cache(root, plan.steps * plan.samples_per_step, accelerator)
    trainer = Trainer(
        task,
        config.training,
        accelerator,
        plan=plan,
        config=config,
        seed=config.seed,
        run=None if dry_run else folder,
        validate_every=config.validation.every if config.validation.images else None,
    )
    report = trainer.train()
    controlnet_line = f"ControlNet: {folder.path / CONTROLNET.folder}"
    encoder_line = controlnet_line if config.trains_controlnet else f"Encoder: {folder.path / FOLDER}"
    command = ["ether-diffusion", "generate", "--adapter", str(folder.path), "--dataset", config.data.dataset_dir]
    command += ["--split", shown.split, "--output", str(folder.path / "images")]
    draw_line = f"Draw:    {shlex.join(command)}"
    results = [*([f"Adapter: {folder.adapter}"] if matched else []), encoder_line, draw_line]
    start.print_result(report, results, dry_run, accelerator)
    return report


def training_pairs(config: ControllableConfig) -> Pairs:
    """What a run learns from. Raises UserError as `find_pairs`."""
    return _find_pairs(config, config.data.split, config.data.captions, config.data.limit)


def _find_pairs(config: ControllableConfig, split: str, captions: Path | None, limit: int | None) -> Pairs:
    data = config.data
    return find_pairs(
        data.dataset_dir,
        split=split,
        condition=data.condition,
        captions=captions,
        caption_template=data.caption_template,
        cache_dir=data.cache_dir,
        limit=limit,
    )


def _validation_pairs(config: ControllableConfig, pairs: Pairs) -> tuple[Pairs, str | None]:
    """The pairs to draw, and what the user should hear: where the config names no split, a faulty one stops nothing.

    Nor does any where no images are drawn while training; what could be drawn is what the last line names.
    """
    data, validation, split = config.data, config.validation, _validation_split(config)
    if split == pairs.split:
        return pairs, None
    captions = captions_of_split(split, pairs.split, data.captions, validation.captions)
    try:
        return _find_pairs(config, split, captions, validation.images or 1), None
    except UserError as error:
        if not validation.images:
            return pairs, None
        if validation.split is not None or validation.captions is not None:
            raise
        return pairs, f'validation draws pairs of split "{pairs.split}": {str(error).splitlines()[0]}'


def _validation_split(config: ControllableConfig) -> str:
    """The one that the config names; else `validation` if there is one; else the one that is trained on."""
    own = "validation" in _splits(config.data.dataset_dir)
    return config.validation.split or ("validation" if own else config.data.split)


def _splits(dataset_dir: str) -> tuple[str, ...]:
    return tuple(SCENES) if dataset_dir.startswith("builtin:") else find_layout(Path(dataset_dir).expanduser()).splits


def _dataset(config: ControllableConfig, pairs: Pairs, caption_dropout: float = 0.0) -> ControllableDataset:
    data = config.data
    return ControllableDataset(
        pairs,
        resolution=data.resolution,
        crop=data.crop,
        horizontal_flip=data.horizontal_flip,
        caption_dropout=caption_dropout,
        seed=config.seed,
    )


def _warm_start(config: ControllableConfig) -> tuple[SavedAdapter | None, Path | None]:
    """The saved adapter and the saved encoder to start from, of one run. A run of another task brings no encoder."""
    source = config.adapter.init_from
    if source is None:
        return None, None
    if config.trains_controlnet:
        return None, start.read_module(source, CONTROLNET).folder
    encoder = find_condition_encoder(source)
    if config.adapter.peft_type:
        return read_adapter(source), encoder
    if encoder is None:
        raise UserError(f"adapter.init_from: {source} holds no {FOLDER}/; expected the folder of a controllable run.")
    return None, encoder


def _controlnet(config: ControllableConfig, base: Base, warm_start: Path | None) -> Any:
    controlnet = build_controlnet(start.reload_in_fp32(config, base).unet, base.vae_factor, config.seed)
    if warm_start is not None:
        fill_module(controlnet, warm_start, CONTROLNET.what)
    if config.training.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
    return controlnet.train()


def _encoder(config: ControllableConfig, base: Base, warm_start: Path | None) -> Any:
    encoder = build_condition_encoder(base.unet, base.vae_factor, config.seed)
    if warm_start is not None:
        fill_condition_encoder(encoder, warm_start)
    if config.freezes_encoder:
        return encoder.requires_grad_(False).eval()
    if config.training.gradient_checkpointing:
        encoder.enable_gradient_checkpointing()
    return encoder.train()


def _print_run_summary(
    config: ControllableConfig,
    base: Base,
    pairs: Pairs,
    note: str | None,
    encoder: nn.Module,
    matched: list[str],
    accelerator: Accelerator,
) -> None:
    """What is about to be trained, and on what."""
    say = accelerator.print
    for line in (*base.notes, *pairs.notes, *([note] if note else [])):
        say(f"Note:    {line}")
    start.print_base(config, base, accelerator)
    if matched:
        start.print_adapter(config, base, matched, accelerator)
    what, rate = "Encoder", config.training.encoder_learning_rate
    if config.trains_controlnet:
        what, rate = "ControlNet", config.training.learning_rate
    if rate is None:
        say(f"Encoder: of {config.adapter.after}, frozen")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        say(f"{what}: {count_parameters(encoder):,} trainable parameters, learning rate {rate:g}")
    kind = f"label maps of {len(pairs.palette) - 1} classes" if pairs.palette is not None else pairs.kind
    say(f'Pairs:   {len(pairs):,} in {pairs.folder}, split "{pairs.split}", conditions: {kind}')

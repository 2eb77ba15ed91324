"""How a run of any task starts: everything checked that can be, then accelerator, base and adapter; and how it ends.

A task calls these in order, with its own data in between. Nothing is written before the loop begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ether_diffusion.adapters.attach import attach, check_layers, count_parameters, meta_copy
from ether_diffusion.adapters.loading import check_same_tensors, fill_adapter
from ether_diffusion.adapters.phases import TEXT_ENCODER
from ether_diffusion.adapters.storage import SavedAdapter, read_adapter
from ether_diffusion.adapters.whole_module_methods import WholeModuleSettings
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import Base, check_base, check_resolution, load_base
from ether_diffusion.models.module_files import check_module, fill_module
from ether_diffusion.models.quantized import check_quantization, number_of_weights, quantize
from ether_diffusion.models.saved_modules import UNET, Kind, SavedModule, find_whole_module

from .config import TaskConfig
from .disk import check_disk, disk_space
from .environment import set_threads
from .loop import Report
from .run_folder import RunFolder
from .schedule import Plan
from .settings import TrainingSettings
from .sharding import check_launch_config


def check_run(config: TaskConfig, dry_run: bool) -> RunFolder:
    """The run's folder, once it is free, and the base can be had as far as can be told without loading it.

    Raises:
        UserError: the folder holds something; no such base; no package to quantise with.
    """
    folder = RunFolder(config.output_dir)
    if not dry_run:
        folder.check_free(resume=bool(config.training.resume))
    check_base(config.base_model, config.vae)
    check_quantization(config.quantization)
    return folder


def start_accelerator(config: TaskConfig, folder: RunFolder, dry_run: bool) -> Accelerator:
    """The processes, their devices, threads and precision, and the tracker.

    Raises:
        UserError: the tracker is not installed; the launch config asks for what would go wrong.
    """
    tracker = config.training.tracker if not dry_run and config.training.tracker != "none" else None
    if tracker == "wandb":
        _require_wandb()
    check_launch_config()
    set_threads()
    return Accelerator(mixed_precision=config.training.mixed_precision, log_with=tracker, project_dir=str(folder.logs))


def precision(accelerator: Accelerator) -> torch.dtype:
    """Of the frozen UNet, its inputs and its prompts' features."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def start_base(config: TaskConfig, accelerator: Accelerator) -> Base:
    """The frozen base on the CPU, its UNet in the precision of training, or quantised on the device.

    Raises:
        UserError: it cannot be loaded, does not take `data.resolution`, or predicts what nothing here can be taught.
    """
    base = load_base(
        config.base_model,
        revision=config.revision,
        vae=config.vae,
        allow_pickle=config.allow_pickle,
        unet_dtype=precision(accelerator),
    )
    if config.quantization is not None:
        quantize(base.unet, config.quantization, accelerator.device)
    check_resolution(config.data.resolution, base, "data.resolution")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"base_model: predicts {base.prediction_type!r}; supported: epsilon, v_prediction.")
    return base


def reload_in_fp32(config: TaskConfig, base: Base) -> Base:
    """The base with its UNet in fp32, to be trained itself, or copied: loaded again where it was rounded or quantised.

    Raises:
        UserError: its UNet was saved quantised.
    """
    if config.quantization is not None or base.unet.dtype != torch.float32:
        options = {"revision": config.revision, "vae": config.vae, "allow_pickle": config.allow_pickle}
        base = load_base(config.base_model, **options)
    if getattr(base.unet, "is_quantized", False):
        raise UserError(
            f"base_model: {base.name} has a quantised UNet; adapter.method: {config.adapter.method} needs its weights."
        )
    return base


def read_module(source: Path, kind: Kind) -> SavedModule:
    """A saved module to start from.

    Raises:
        UserError: there is none of this kind.
    """
    found = find_whole_module(source, kind)
    if found is None:
        raise UserError(
            f"adapter.init_from: {source} holds no {kind.folder}/; expected the folder of a run of this method, or a "
            f"{kind.class_name} in diffusers' layout."
        )
    return found


def with_checkpoints_to_keep(adapter: Any, training: TrainingSettings) -> Any:
    """The settings with `keep_checkpoints` filled in, where whole modules would fill a disk."""
    if training.keep_checkpoints is not None or not isinstance(adapter, WholeModuleSettings):
        return training
    return training.model_copy(update={"keep_checkpoints": training.keep_states})


def try_adapter(config: TaskConfig, base: Base, warm_start: SavedAdapter | SavedModule | None) -> None:
    """Attach to weightless copies, so that what does not fit is refused before anything that takes long.

    Raises:
        UserError: the target matches nothing; settings or `warm_start` do not fit.
    """
    if isinstance(warm_start, SavedModule):
        check_module(base.unet, warm_start.folder, UNET.what)
    if isinstance(config.adapter, WholeModuleSettings):
        return
    check_layers(base.unet, config.adapter)  # its own layers: a copy does not tell that torchao quantised them
    trial = meta_copy(base.unet)
    attach(trial, config.adapter)
    if config.adapter.text_encoder:
        attach(meta_copy(base.text_encoder), config.adapter.for_text_encoder())
    if isinstance(warm_start, SavedAdapter):
        check_same_tensors(trial, warm_start)


def attach_adapter(config: TaskConfig, base: Base, warm_start: SavedAdapter | SavedModule | None) -> list[str]:
    """Attach to the UNet, and to the text encoder where it is trained too. Gives the names of the adapted layers.

    Where the whole UNet is trained, nothing is attached, and there are no such layers.
    """
    if isinstance(config.adapter, WholeModuleSettings):
        if isinstance(warm_start, SavedModule):
            fill_module(base.unet, warm_start.folder, UNET.what)
        base.unet.requires_grad_(True)
        train_mode(config, base)
        return []
    assert not isinstance(warm_start, SavedModule)
    matched = attach(base.unet, config.adapter, config.seed)
    if warm_start is not None:
        fill_adapter(base.unet, warm_start)
    if config.adapter.text_encoder:
        matched += attach(base.text_encoder, config.adapter.for_text_encoder(), config.seed)
        if warm_start is not None:
            fill_adapter(base.text_encoder, read_adapter(warm_start.folder / TEXT_ENCODER))
        if config.training.gradient_checkpointing:
            base.text_encoder.gradient_checkpointing_enable()
        base.text_encoder.train()
    train_mode(config, base)
    return matched


def train_mode(config: TaskConfig, base: Base) -> None:
    """Have the UNet keep what the backward pass needs, or recompute it."""
    if config.training.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()


def print_base(config: TaskConfig, base: Base, accelerator: Accelerator) -> None:
    """Say what base is trained upon."""
    name = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    quantised = f", {config.quantization}" if config.quantization else ""
    numbers = number_of_weights(base.unet) or count_parameters(base.unet)  # where all of them are trained
    size = f"{numbers / 1e6:,.1f}M parameters in the UNet"
    accelerator.print(f"Base:    {base.name}, {size}, {name} precision{quantised}")


def print_adapter(config: TaskConfig, base: Base, matched: list[str], accelerator: Accelerator) -> None:
    """Say what is attached to the base or trained of it, and how fast it learns."""
    trained = count_parameters(base.unet) + count_parameters(base.text_encoder)
    label, where = ("Adapter", f" in {len(matched)} layers") if matched else ("Trained", "")
    accelerator.print(
        f"{label}: {type(config.adapter).title}, {trained:,} trainable parameters{where}, "
        f"learning rate {config.training.learning_rate:g}"
    )


def print_plan(plan: Plan, accelerator: Accelerator) -> None:
    """Say how long it is trained."""
    samples = f"{plan.samples_per_step} sample{'s' * (plan.samples_per_step > 1)}"
    accelerator.print(f"Steps:   {plan.steps:,} with {samples} each, on {accelerator.device}")


def print_disk(
    config: TaskConfig, plan: Plan, trained: int, folder: RunFolder | None, accelerator: Accelerator
) -> None:
    """Say how much of the disk whole modules take, with so many trained numbers.

    Args:
        folder: Where they are to go; None: in a trial, nowhere.

    Raises:
        UserError: the disk has not that much left.
    """
    space = disk_space(config.training, plan.steps, trained)
    if folder is not None:
        check_disk(space, folder)
    accelerator.print(space.line())


def print_result(report: Report, results: list[str], dry_run: bool, accelerator: Accelerator) -> None:
    """Say what came of it.

    Args:
        results: Lines on where the results lie, the first of which is told how long a step took.
    """
    pace = f"{report.seconds_per_step:.2f} s a step, peak memory {report.peak_memory / 2**30:.2f} GiB"
    if dry_run:
        accelerator.print(f"Dry run: {pace}. Nothing was written.")
        return
    first, *others = results
    accelerator.print(f"{first} ({pace if report.steps_taken else 'all steps were taken before'})")
    for line in others:
        accelerator.print(line)


def _require_wandb() -> None:
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("training.tracker: wandb is not installed: pip install wandb.") from None

"""A run of any task, from its resolved config to its last line."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from ether_diffusion.adapters.attach import adapted_layers, count_parameters
from ether_diffusion.adapters.certificate import Certificate
from ether_diffusion.adapters.saved_adapter import PreviousAdapter, SavedAdapter
from ether_diffusion.adapters.targets import reach
from ether_diffusion.errors import UserError
from ether_diffusion.exporting.hub_folder import push
from ether_diffusion.files import os_error_line
from ether_diffusion.hub import check_can_push
from ether_diffusion.models.bases import Base, check_base
from ether_diffusion.models.prompt_notes import long_texts_note
from ether_diffusion.models.quantized import check_quantization, number_of_weights

from .config import TaskConfig
from .environment import is_first_process, out_of_memory_hint, preparing, start_accelerator
from .loop import Trainer
from .resuming import resumes
from .run_folder import RunFolder, disk_line
from .schedule import Plan, make_plan
from .second_phase import check_previous, find_previous, merge_previous
from .task import C, Report, Task
from .training_base import attach_adapter, check_start, load_training_base, reload_in_fp32, try_adapter


def run_task(kind: Callable[[C, SavedAdapter | None, bool], Task[C]], config: C, dry_run: bool) -> Report:
    """Train as a resolved config says, into `output_dir`; a dry run trains one step and writes nothing.

    Args:
        kind: The task's class.

    Raises:
        UserError: the data, the base or the run folder is at fault; then nothing is written to `output_dir`. Or the
            result fails its certificate; it is written then, and marked.
        Interrupted, TrainingFailed: as `Trainer.train`.
    """
    folder = RunFolder(config.output_dir)
    with contextlib.nullcontext() if dry_run else folder.claimed(config.training.resume):
        return _run(kind, config, folder, dry_run)


def _run(
    kind: Callable[[C, SavedAdapter | None, bool], Task[C]], config: C, folder: RunFolder, dry_run: bool
) -> Report:
    # Check everything that needs no base: names, the hub, previous adapter, data, weights to start from.
    check_base(config.base_model, config.vae)
    check_quantization(config.quantization)
    if config.push_to_hub is not None and is_first_process():
        check_can_push(config.push_to_hub)
    config, previous = find_previous(config, folder)
    task = kind(config, previous, resumes(folder.checkpoints, config.training.resume))

    # Load the base; refuse what does not fit it, or the disk, before anything that takes long.
    accelerator = start_accelerator(config.training, folder.logs, dry_run)
    with out_of_memory_hint(config.training, accelerator.mixed_precision):
        return _train(config, task, previous, accelerator, folder, dry_run)


def _train(
    config: TaskConfig,
    task: Task[Any],
    previous: PreviousAdapter | None,
    accelerator: Accelerator,
    folder: RunFolder,
    dry_run: bool,
) -> Report:
    base = load_training_base(config, accelerator)
    task.check_base(base)
    check_previous(base, previous)
    try_adapter(config, base, task.initial)
    processes, rank = accelerator.num_processes, accelerator.process_index
    plan = make_plan(config.training, task.samples_per_epoch, processes, rank)
    if weights := task.whole_weights(base):
        accelerator.print(disk_line(config.training, plan.steps, weights, None if dry_run else folder))

    # Build what is trained.
    with preparing():
        task.use_base(base, accelerator, dry_run)  # in the precision of training, whatever the method
    if config.trains_unet:
        base = reload_in_fp32(config, base)
    merge_previous(base, previous)
    layers = attach_adapter(config, base, task.initial)
    task.start_faults = {} if dry_run or task.initial else check_start(config, base)
    task.build(base, plan, accelerator)
    notes = (*base.notes, long_texts_note(*base.prompt_reader, task.texts(), "prompts and captions"))
    lines = [*(f"Note:    {note}" for note in notes if note), *task.notes, base_line(config, base, accelerator)]
    lines += [*adapter_lines(config, base, layers), *task.summary(), *reach_lines(base), plan_line(plan, accelerator)]
    for line in lines:
        accelerator.print(line)
    if not dry_run:
        with preparing():
            task.fill_caches(plan, accelerator)

    # Train.
    report = Trainer(task, config, accelerator, plan, None if dry_run else folder).train()
    if dry_run:
        accelerator.print(f"Dry run: {_pace(report)}. Nothing was written.")
        return report
    print_result(task, folder, config, report, accelerator)
    return report


def print_result(
    task: Task[Any], folder: RunFolder, config: TaskConfig, report: Report, accelerator: Accelerator
) -> None:
    """Say where the result of a finished run is, and how to generate from it; publish it, if the config says so.

    Raises:
        UserError: the result fails its certificate, or cannot be published.
    """
    first, *others = task.results(folder)
    if config.validation.enabled:
        others.append(f"Samples: {folder.samples}")
    command = ["ether-diffusion", "generate", "--adapter", str(folder.path), *task.example(folder)]
    accelerator.print(f"{first} ({_pace(report) if report.steps_taken else 'all steps were taken before'})")
    certificate, fault = report.certificate, ""
    if certificate is not None and certificate.faults:
        fault = f"{folder.path}: the weights are written and marked as not certified: {certificate.line}"
    elif certificate is not None:
        others = [_certified_line(certificate), *others]
    for line in (*others, f"Generate: {shlex.join(command)}"):
        accelerator.print(line)
    if fault and config.training.require_certificate:
        raise UserError(fault)
    if fault:
        accelerator.print(f"Note:    {fault}")
    if config.push_to_hub is not None and accelerator.is_main_process:
        _push(config, folder)
    accelerator.wait_for_everyone()


def _pace(report: Report) -> str:
    return f"{report.seconds_per_step:.2f} s a step, peak memory {report.peak_memory / 2**30:.2f} GiB"


def _certified_line(certificate: Certificate) -> str:
    measured = certificate.measured
    if not measured["layers"]:
        return "Certified: the weights moved"
    moved = f"{measured['layers']} layers moved, {measured['share_below_1e-7']:.1%} of them by less than 1e-7"
    changes = [*measured.get("changes", {}).values()]
    effect = f"; three of them change their outputs by {min(changes):.2g} to {max(changes):.2g}" if changes else ""
    return f"Certified: {moved}{effect}"


def _push(config: TaskConfig, folder: RunFolder) -> None:
    """Publish the trained adapter. Raises UserError: it could not be, with the command that tries again."""
    assert config.push_to_hub is not None
    options = ["--adapter", str(folder.path), "--repo", config.push_to_hub, *["--private"] * config.hub_private]
    try:
        *lines, address = push(folder.path, config.push_to_hub, private=config.hub_private)
    except (UserError, OSError) as error:
        command = shlex.join(["ether-diffusion", "push", *options])
        reason = os_error_line(error) if isinstance(error, OSError) else error
        raise UserError(f"{reason} The adapter is trained and saved; publish it with: {command}") from error
    for line in (*lines, f"Hub:     {address}"):
        print(line)


def base_line(config: TaskConfig, base: Base, accelerator: Accelerator) -> str:
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    quantised = f", {config.quantization}" if config.quantization else ""
    denoiser = base.denoiser
    numbers = number_of_weights(denoiser) or count_parameters(denoiser)  # the frozen ones; or all are trained
    part = "UNet" if base.family.denoiser == "unet" else base.family.denoiser
    return f"Base:    {base.name}, {numbers / 1e6:,.1f}M parameters in the {part}, {precision} precision{quantised}"


def adapter_lines(config: TaskConfig, base: Base, layers: list[str]) -> list[str]:
    trained = sum(map(count_parameters, base.adaptable.values()))
    if not trained:
        return []
    label, where = ("Adapter", f" in {len(layers)} layers") if layers else ("Trained", "")
    rate = f"learning rate {config.training.learning_rate:g}"
    return [f"{label}: {type(config.adapter).title}, {trained:,} trainable parameters{where}, {rate}"]


def reach_lines(base: Base) -> list[str]:
    """How much of the denoiser the adapter in it reaches."""
    adapted = adapted_layers(base.denoiser)
    return [f"Reach:   {reach(base.denoiser, adapted)}"] if adapted else []


def plan_line(plan: Plan, accelerator: Accelerator) -> str:
    samples = f"{plan.samples_per_step} sample{'s' * (plan.samples_per_step > 1)}"
    return f"Steps:   {plan.steps:,} with {samples} each, on {accelerator.device}"

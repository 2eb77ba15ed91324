"""Many runs at once, from their resolved configs to their last lines: what they must share, and how many fit."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ether_diffusion.adapters.attach import sharing_copy
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError, first_line
from ether_diffusion.files import checkpoint_name, list_checkpoints, step_of
from ether_diffusion.hub import check_can_push
from ether_diffusion.input_files import read_text
from ether_diffusion.models.bases import Base, check_base
from ether_diffusion.models.prompt_notes import long_texts_note
from ether_diffusion.models.quantized import check_quantization

from .checkpoint import flatten, read_checkpoint
from .config import TaskConfig
from .environment import OutOfMemory, make_accelerator, out_of_memory_hint, preparing, start_accelerator
from .loop import Trainer
from .packed import Outcome, Pack, train_together
from .resuming import resumes, set_aside_after
from .run_folder import GIB, RunFolder
from .run_task import adapter_lines, base_line, plan_line, print_result
from .schedule import Plan, make_plan
from .task import C, Report, Task
from .training_base import attach_adapter, check_start, load_training_base, try_adapter

MAY_DIFFER = ("output_dir", "push_to_hub", "seed", "data.", "validation.prompts", "training.learning_rate")
MUST_AGREE = ("data.resolution",)
"""Of what begins with one of those."""
ROOM = 0.9
"""Share of the free memory that counts as room for runs: what varies from step to step needs the rest."""


def read_overrides(file: Path) -> list[dict[str, Any]]:
    """The runs of a YAML file: a list of mappings from keys, as `data.class_name`, to the values that a run has.

    Raises:
        UserError: it is no such list.
    """
    text = read_text(file)
    try:
        runs = OmegaConf.create(text)
        runs = OmegaConf.to_container(runs, resolve=False) if isinstance(runs, ListConfig) else None
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {first_line(error)}") from None
    if not isinstance(runs, list) or not runs:
        raise UserError(f"{file}: expected a list of runs, as `- {{output_dir: runs/a, seed: 1}}`.")
    for number, run in enumerate(runs, 1):
        if not isinstance(run, dict) or not all(isinstance(key, str) for key in run):
            raise UserError(f"{file}, run {number}: {run!r:.60}; expected settings, as output_dir: runs/a.")
    return runs  # pyright: ignore[reportReturnType]


def as_overrides(run: dict[str, Any]) -> list[str]:
    """A run's settings as overrides of a command line, whose values are quoted as `load_config` reads them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in run.items()]


def shared_settings(config: TaskConfig) -> dict[str, Any]:
    """The settings in which runs that train together are equal, by their dotted names."""
    settings = flatten(config.model_dump(mode="json"))
    return {key: v for key, v in settings.items() if key in MUST_AGREE or not key.startswith(MAY_DIFFER)}


def why_alone(config: TaskConfig) -> str | None:
    """Why a run shares no passes, whatever the others are; None: it can."""
    if not config.adapter.packs:
        return (
            f"adapter.method: {config.adapter.method} runs do not train together: that takes a method whose adapters "
            "a batch can mix, ether or ether_plus. Train these runs one by one."
        )
    for key in ("compile", "profile"):
        if value := getattr(config.training, key):
            return f"training.{key}: {value}, which runs that train together do not support."
    if config.adapter.text_encoder:
        return "adapter.text_encoder: true, but runs that train together share the frozen text encoder."
    return None


def check_runs(configs: Sequence[TaskConfig]) -> None:
    """Refuse runs that cannot share their passes.

    Raises:
        UserError: all settings that differ and must not, a line each; or the method, or a setting, that does not pack.
    """
    faults, common = [], shared_settings(configs[0])
    places: dict[Any, int] = {}
    for number, config in enumerate(configs, 1):
        own = shared_settings(config)
        faults += [
            f"run {number}: {key} is {own.get(key)!r}, and {common.get(key)!r} in run 1"
            for key in sorted(own.keys() | common.keys())
            if own.get(key) != common.get(key)
        ]
        for key, place in (("output_dir", config.output_dir.absolute()), ("push_to_hub", config.push_to_hub)):
            if place is not None and (other := places.setdefault(place, number)) != number:
                faults.append(f"run {number}: {key} {getattr(config, key)} is run {other}'s; give each run its own")
    if faults:
        shared = "Runs that train together differ in output_dir, seed, data.… (not data.resolution), "
        raise UserError("\n".join([*faults, f"{shared}validation.prompts and training.learning_rate alone."]))
    if reason := why_alone(configs[0]):
        raise UserError(reason)


class RunsFailed(TrainingFailed):
    """Some of the runs that trained together failed; the message names them.

    Args:
        outcomes: Of all runs that were begun, in their order.
    """

    def __init__(self, message: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


@dataclass(frozen=True)
class Run:
    """One of the runs, with its task."""

    number: int
    config: Any
    folder: RunFolder
    task: Any
    """None once it is trained, so that its copy of the UNet takes no memory."""
    accelerator: Accelerator

    @property
    def name(self) -> str:
        return f"run {self.number} ({self.config.output_dir})"


def run_many(
    kind: Callable[[C, SavedAdapter | None, bool], Task[C]],
    configs: Sequence[C],
    *,
    dry_run: bool = False,
    max_together: int | None = None,
) -> list[Report]:
    """Train runs in shared passes, each into its own `output_dir`; a dry run measures how many fit, and writes nothing.

    Args:
        kind: The task's class.
        configs: Resolved ones.
        max_together: Train at most so many at once, the others after them. Default: all.

    Returns:
        The runs' reports, in their order; of a dry run, those of the largest number that was tried.

    Raises:
        UserError: as `check_runs` and `run_task`; then nothing is written.
        Interrupted: a signal came; every run has a checkpoint.
        RunsFailed: names the runs that failed. The others are complete.
        OutOfMemory: so many do not fit.
    """
    check_runs(configs)
    folders = [RunFolder(config.output_dir) for config in configs]
    with contextlib.ExitStack() as claims:
        for config, folder in () if dry_run else zip(configs, folders, strict=True):
            claims.enter_context(folder.claimed(config.training.resume))
        return _run_all(kind, configs, folders, dry_run, max_together or len(configs))


def _run_all(
    kind: Callable[..., Task[Any]], configs: Sequence[Any], folders: Sequence[RunFolder], dry_run: bool, together: int
) -> list[Report]:
    # Check everything that needs no base.
    first, tasks = configs[0], []
    check_base(first.base_model, first.vae)
    check_quantization(first.quantization)
    for start in () if dry_run else range(0, len(configs), together):
        if all(config.training.resume in (True, "latest") for config in configs):
            _align(folders[start : start + together])
    for number, (config, folder) in enumerate(zip(configs, folders, strict=True), 1):
        with _named(f"run {number} ({config.output_dir})"):
            if config.push_to_hub is not None:
                check_can_push(config.push_to_hub)
            tasks.append(kind(config, None, resumes(folder.checkpoints, config.training.resume)))
    accelerator = start_accelerator(first.training, folders[0].logs, dry_run)
    if accelerator.num_processes > 1:
        raise UserError(
            f"--many: {accelerator.num_processes} processes were launched; runs train together in one process. "
            "Launch one process a GPU with a part of the runs each."
        )
    others = [make_accelerator(c.training, f.logs, dry_run) for c, f in zip(configs[1:], folders[1:], strict=True)]
    runs = [
        Run(number, *parts)
        for number, parts in enumerate(zip(configs, folders, tasks, [accelerator, *others], strict=True), 1)
    ]

    with _hint(first, accelerator, together):
        # The base, once; what each run needs of it bare.
        base = load_training_base(first, accelerator)
        for run in runs:
            with _named(run.name):
                run.task.check_base(base)
                try_adapter(run.config, base, run.task.initial)
                with preparing():
                    run.task.use_base(base, accelerator, dry_run)
        for line in (*(f"Note:    {note}" for note in base.notes), base_line(first, base, accelerator)):
            accelerator.print(line)
        if dry_run:
            return _measure(runs[:together], base, accelerator, len(runs))

        # Train: some at a time.
        outcomes: list[Outcome] = []
        for start in range(0, len(runs), together):
            outcomes += _train(runs[start : start + together], base, accelerator)
            runs[start : start + together] = [replace(run, task=None) for run in runs[start : start + together]]
            if any(isinstance(outcome, Interrupted) for outcome in outcomes):
                break
    return _reports(runs, outcomes)


def _align(folders: Sequence[RunFolder]) -> None:
    """Where a kill came while runs wrote the same checkpoint, let those that have it resume from the one before too.

    Runs that resume from the same steps take the same passes as before, and so end bit for bit as if nothing had come.
    """
    found = {folder: [step_of(path) or 0 for path in list_checkpoints(folder.checkpoints)] for folder in folders}
    lasts = {max(steps, default=0) for steps in found.values()}
    if len(lasts) != 2:
        return
    before, last = sorted(lasts)
    ahead = [folder for folder, steps in found.items() if last in steps]
    for folder in ahead:
        if found[folder][-2:-1] != [before] * (before > 0) or (not before and folder.adapter.exists()):
            return
        if before and isinstance(read_checkpoint(folder.checkpoints / checkpoint_name(before)), str):
            return
    for folder in ahead:
        set_aside_after(folder.checkpoints, before)
        print(f"{folder.path}: resumes from step {before}, the last one that all runs have.")


def _train(runs: Sequence[Run], base: Base, accelerator: Accelerator) -> list[Outcome]:
    pack = make_pack(build_trainers(runs, base, accelerator), base, accelerator)
    outcomes = train_together(pack, [run.name for run in runs], print)
    return [_finished(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]


def _finished(run: Run, outcome: Outcome) -> Outcome:
    """Print where the result of a run is; a fault of the result takes the place of the report."""
    try:
        if isinstance(outcome, Report):
            print_result(run.task, run.folder, run.config, outcome, run.accelerator)
    except UserError as error:
        return error
    return outcome


def build_trainers(runs: Sequence[Run], base: Base, accelerator: Accelerator, dry_run: bool = False) -> list[Trainer]:
    """A trainer for each run, on a denoiser of its own that shares the base's tensors."""
    plans: list[Plan] = []
    for run in runs:
        config, task = run.config, run.task
        own = base.with_denoiser(sharing_copy(base.denoiser))
        layers = attach_adapter(config, own, task.initial)
        task.start_faults = {} if dry_run or task.initial else check_start(config, own)
        plans.append(make_plan(config.training, task.samples_per_epoch))
        task.build(own, plans[-1], run.accelerator)
        task.encoders.shared = True
        if run is runs[0]:
            accelerator.print(*adapter_lines(config, own, layers), plan_line(plans[-1], accelerator), sep="\n")
        rate, note = (
            config.training.learning_rate,
            long_texts_note(*base.prompt_reader, task.texts(), "prompts and captions"),
        )
        accelerator.print(f"Run {run.number}:   {config.output_dir}, seed {config.seed}, learning rate {rate:g}")
        for line in (*([f"Note:    {note}"] if note else []), *task.notes, *task.summary()):
            accelerator.print(line)
    if not dry_run:
        for run, plan in zip(runs, plans, strict=True):
            with preparing():
                run.task.fill_caches(plan, run.accelerator)
    return [_trainer(run, plan, None if dry_run else run.folder) for run, plan in zip(runs, plans, strict=True)]


def _trainer(run: Run, plan: Plan, folder: RunFolder | None) -> Trainer:
    with _named(run.name):
        return Trainer(run.task, run.config, run.accelerator, plan, folder, packed=True)


def make_pack(trainers: Sequence[Trainer], base: Base, accelerator: Accelerator) -> Pack:
    """The shared passes of these trainers' runs, on a further copy of the base."""
    settings = trainers[0].config
    denoiser: Any = sharing_copy(base.denoiser).train()
    if settings.training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return Pack(denoiser, settings.adapter.for_model(base.denoiser).peft_config(), trainers, accelerator)


def _measure(runs: Sequence[Run], base: Base, accelerator: Accelerator, wanted: int) -> list[Report]:
    """Train a step with one run, with two, four, … and say how many fit into memory."""
    trainers = build_trainers(runs, base, accelerator, dry_run=True)
    sizes = [1]
    while sizes[-1] < len(trainers):
        sizes.append(min(2 * sizes[-1], len(trainers)))
    peaks: dict[int, int] = {}
    reports: list[Report] = []
    fit = 0
    for size in sizes:
        if size > 2 and size > fit:
            break
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        some = [_trainer(run, trainer.plan, None) for run, trainer in zip(runs[:size], trainers, strict=False)]
        outcomes = train_together(make_pack(some, base, accelerator), [run.name for run in runs[:size]], print)
        reports = _reports(runs, outcomes)
        peaks[size] = reports[-1].peak_memory
        pace = statistics.median(report.seconds_per_step for report in reports)
        accelerator.print(
            f"{size} at once: {pace:.2f} s a step, {pace / size:.2f} s a run's, peak memory {peaks[size] / GIB:.2f} GiB"
        )
        if size > 1:
            before = sizes[sizes.index(size) - 1]
            each = max(1, (peaks[size] - peaks[before]) // (size - before))
            fit = size + int(ROOM * _free_memory(accelerator.device)) // each
    if len(sizes) == 1:
        accelerator.print("Dry run: with one run nothing was measured on how many fit. Nothing was written.")
    elif fit >= wanted:
        accelerator.print(f"Dry run: all {wanted} runs fit into memory at once. Nothing was written.")
    else:
        accelerator.print(
            f"Dry run: {fit} of {wanted} runs fit into memory: --max-together {fit}. Nothing was written."
        )
    return reports


def _free_memory(device: torch.device) -> int:
    """Bytes that further runs could take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def _reports(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> list[Report]:
    """The reports, if all runs ended well.

    Raises:
        Interrupted, RunsFailed: what stopped the others.
    """
    stopped = [outcome for outcome in outcomes if isinstance(outcome, Interrupted)]
    if stopped:
        unfinished = f"Stopped: {len(stopped)} of {len(runs)} runs have steps left"
        waiting = f", {len(runs) - len(outcomes)} were not begun" if len(outcomes) < len(runs) else ""
        hint = "The same command with training.resume=true resumes all runs."
        raise Interrupted(stopped[0].signum, f"{unfinished}{waiting}. {hint}")
    failed = [(run, outcome) for run, outcome in zip(runs, outcomes, strict=False) if isinstance(outcome, Exception)]
    if failed:
        lines = [f"{run.name}: {outcome}" for run, outcome in failed]
        lines.append(f"{len(failed)} of {len(outcomes)} runs failed; the others are complete.")
        raise RunsFailed("\n".join(lines), outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Report)]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Within the block an error of the user's input names the run."""
    try:
        yield
    except UserError as error:
        raise UserError("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from error


@contextlib.contextmanager
def _hint(config: TaskConfig, accelerator: Accelerator, together: int) -> Iterator[None]:
    try:
        with out_of_memory_hint(config.training, accelerator.mixed_precision):
            yield
    except OutOfMemory as error:
        if together > 1:
            raise OutOfMemory(f"{error} Or train fewer runs at once: --max-together {together // 2}.") from error
        raise

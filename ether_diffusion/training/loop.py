"""The training loop. It knows no task and no method: a task brings the module that is trained, its data and its files."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import Settings
from ..errors import UserError
from ..randomness import derive_seed
from .checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from .environment import Interrupted, StopRequest, peak_memory
from .run import RunFolder
from .settings import TrainingSettings


class Task(Protocol):
    """What the loop needs of a task."""

    module: nn.Module
    """Everything that is trained, in one module. `module(batch)` gives the losses by name; `loss` is minimised."""

    dataset: Dataset
    """Samples by global sample index, from 0 on without end; `len` is the size of an epoch."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Trained parameters for the optimiser, each group with its `lr`."""
        ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What happens to a batch outside of the trained module: frozen encoders, noise."""
        ...

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch."""
        ...

    def save(self, folder: Path, step: int) -> None:
        """Write the trained weights into `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Read weights that `save` wrote."""
        ...

    def validate(self, step: int, path: Path) -> dict[str, float]:
        """Draw validation images into `path`; trained weights stay as they are."""
        ...


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do."""


@dataclass(frozen=True)
class Report:
    """What a finished run, or a dry one, says of itself."""

    steps: int
    loss: float
    seconds_per_step: float
    peak_memory: int


def train(
    task: Task,
    settings: TrainingSettings,
    accelerator: Accelerator,
    *,
    config: Settings,
    seed: int,
    run: RunFolder | None,
    validate_every: int | None = None,
) -> Report:
    """Train to the last step, from the last checkpoint if the settings resume. Without a run folder: one step, no file.

    Raises:
        Interrupted: a signal came; the step in hand was finished and a checkpoint written.
        TrainingFailed: the loss is not finite, or memory ran out.
        UserError: the run cannot be resumed with these settings.
    """
    # The plan: how many samples a step takes, how many steps there are.
    per_step = settings.batch_size * settings.gradient_accumulation * accelerator.num_processes
    total = total_steps(settings, len(task.dataset), per_step)  # pyright: ignore[reportArgumentType]
    base_rate = settings.learning_rate
    assert base_rate is not None

    # Optimiser and schedule. The rate is a function of the step alone, so it needs no state and no per-process stepping.
    groups = task.parameter_groups(base_rate)
    optimizer = torch.optim.AdamW(
        groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.epsilon
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    factor = rate_factor(settings, total)

    # Where to begin.
    start, checkpoint = 0, None
    if run is not None and settings.resume:
        checkpoint = find_checkpoint(run.checkpoints, settings.resume, accelerator.print)
    if checkpoint is not None:
        check_resumable(checkpoint, config, settings, accelerator)
        task.load(checkpoint.folder)
        start = checkpoint.step
        if start > total:
            raise UserError(f"training.steps: {total} is less than the {start} steps of {checkpoint.folder}.")
    module, optimizer = accelerator.prepare(task.module, optimizer)
    if checkpoint is not None:
        checkpoint.load_optimizer(optimizer.optimizer)
        if accelerator.scaler is not None and checkpoint.trainer["scaler"]:
            accelerator.scaler.load_state_dict(checkpoint.trainer["scaler"])
        accelerator.print(f"Resuming {checkpoint.folder} at step {start} of {total}.")

    # Files.
    if run is not None:
        if accelerator.is_main_process:
            run.create(config)
            run.forget_after(start)
        accelerator.wait_for_everyone()
        if settings.tracker != "none":
            accelerator.init_trackers("ether_diffusion", _flat(config))
    trainer_state = {"settings": config.model_dump(mode="json"), "samples_per_step": per_step}

    def save(step: int) -> Path | None:
        assert run is not None
        folder = run.checkpoints / f"step-{step:06d}"
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            save_checkpoint(
                run.checkpoints,
                step,
                save_weights=lambda path: task.save(path, step),
                optimizer=optimizer.optimizer,
                trainer={**trainer_state, "scaler": scaler},
                keep_states=settings.keep_states,
            )
        accelerator.wait_for_everyone()
        return folder

    def validate(step: int) -> None:
        if run is None or not validate_every or (step % validate_every and step != total):
            return
        if accelerator.is_main_process:
            for name, value in task.validate(step, run.samples / f"step-{step:06d}.png").items():
                accelerator.log({f"validation/{name}": value}, step=step)
        accelerator.wait_for_everyone()

    # The loop.
    last = start + 1 if run is None else total
    batches = iter(_loader(task, settings, accelerator, start, last, per_step))
    saved, began, losses = (start if checkpoint else None), time.perf_counter(), {}
    if start == 0:
        validate(0)
    stop = StopRequest()
    bar = tqdm(
        total=total if run is not None else 1, initial=start, desc="training", unit="step", dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    )
    try:
        with stop.listening(), bar, _out_of_memory_hint(settings):
            for step in range(start + 1, last + 1):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor(step - 1)
                sums: dict[str, Tensor] = {}
                for part in range(settings.gradient_accumulation):
                    batch = task.prepare(next(batches))
                    # Dropout and the like draw from torch's global generator: a function of the step, as all else.
                    position = (step - 1) * settings.gradient_accumulation + part
                    torch.manual_seed(derive_seed(seed, f"module/{accelerator.process_index}", position))
                    with _sync_when_last(accelerator, module, part == settings.gradient_accumulation - 1):
                        losses = module(batch)
                        accelerator.backward(losses["loss"] / settings.gradient_accumulation)
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0) + value.detach().float() / settings.gradient_accumulation
                values = {name: float(accelerator.reduce(value, "mean")) for name, value in sums.items()}
                if not math.isfinite(values["loss"]):
                    raise TrainingFailed(_not_finite(step, values["loss"], saved, run, settings))
                norm = _clip(accelerator, module, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                # What is told and kept.
                rate = rates[0] * factor(step - 1)
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{rate:.2g}")
                if run is None:
                    continue
                row = {"step": step, **values, "learning_rate": rate, "grad_norm": norm}
                accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
                if accelerator.is_main_process:
                    run.log(row | {"seconds": round(time.perf_counter() - began, 3)})
                signum = _agreed(accelerator, stop.signum)
                if step % settings.checkpoint_every == 0 or step == total or signum:
                    save(step)
                    saved = step
                if signum:
                    raise Interrupted(signum, _stopped(step, total, run))
                validate(step)
    finally:
        if run is not None and settings.tracker != "none":
            accelerator.end_training()
    if run is not None:
        if accelerator.is_main_process:
            task.save(run.path, total)
        accelerator.wait_for_everyone()
    done = max(1, last - start)
    loss = float(losses["loss"].detach()) if losses else math.nan
    return Report(total, loss, (time.perf_counter() - began) / done, peak_memory(accelerator.device))


def total_steps(settings: TrainingSettings, samples: int, per_step: int) -> int:
    """Optimiser steps of a run."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return math.ceil(settings.epochs * samples / per_step)


def rate_factor(settings: TrainingSettings, total: int) -> Callable[[int], float]:
    """The schedule: the factor on the learning rate as a function of the number of steps already taken."""
    name = settings.schedule
    if name == "constant" and settings.warmup_steps:
        name = "constant_with_warmup"
    dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(name, dummy, num_warmup_steps=settings.warmup_steps, num_training_steps=total)
    return schedule.lr_lambdas[0]


# A resumed run may differ from the interrupted one in these; in anything else it would not be the same run.
_FREE_TO_CHANGE = ("output_dir", "training.resume", "training.checkpoint_every", "training.keep_states",
                   "training.workers", "training.tracker", "validation.")  # fmt: skip


def check_resumable(
    checkpoint: Checkpoint, config: Settings, settings: TrainingSettings, accelerator: Accelerator
) -> None:
    """Refuse to go on with settings that would make another run of it.

    Raises:
        UserError: names every setting that changed, with both values.
    """
    before, after = _flat_json(checkpoint.trainer["settings"]), _flat_json(config.model_dump(mode="json"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    free = _FREE_TO_CHANGE + (("training.steps", "training.epochs") if settings.schedule == "constant" else ())
    faults = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(changed)
        if not key.startswith(free)
    ]
    per_step = settings.batch_size * settings.gradient_accumulation * accelerator.num_processes
    if not faults and per_step != checkpoint.trainer["samples_per_step"]:
        faults.append(f"samples a step were {checkpoint.trainer['samples_per_step']} and are {per_step}")
    if faults:
        raise UserError(f"training.resume: {checkpoint.folder} was trained with other settings: {'; '.join(faults)}.")


class _GlobalBatches:
    """Batches of global sample indices for one process, from one step to another."""

    def __init__(self, start: int, last: int, per_step: int, settings: TrainingSettings, rank: int, world: int) -> None:
        self.start, self.last, self.per_step = start, last, per_step
        self.size, self.parts, self.rank, self.world = settings.batch_size, settings.gradient_accumulation, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.last):
            for part in range(self.parts):
                first = step * self.per_step + (part * self.world + self.rank) * self.size
                yield list(range(first, first + self.size))

    def __len__(self) -> int:
        return (self.last - self.start) * self.parts


def _loader(
    task: Task, settings: TrainingSettings, accelerator: Accelerator, start: int, last: int, per_step: int
) -> DataLoader:
    batches = _GlobalBatches(start, last, per_step, settings, accelerator.process_index, accelerator.num_processes)
    return DataLoader(
        task.dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=task.collate,
        num_workers=settings.workers,
        # The base seed of the workers would otherwise come from the global generator.
        generator=torch.Generator().manual_seed(0),
    )


def _sync_when_last(accelerator: Accelerator, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if last else accelerator.no_sync(module)


def _clip(accelerator: Accelerator, module: nn.Module, limit: float | None) -> float:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    norm = accelerator.clip_grad_norm_(parameters, limit if limit is not None else math.inf)
    return float(norm) if norm is not None else math.nan


def _agreed(accelerator: Accelerator, signum: int) -> int:
    """The same answer in every process, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return signum
    flag = torch.tensor(float(signum), device=accelerator.device)
    return int(accelerator.gather(flag.reshape(1)).max())  # pyright: ignore[reportAttributeAccessIssue]


def _not_finite(step: int, loss: float, saved: int | None, run: RunFolder | None, settings: TrainingSettings) -> str:
    last = f"The last good checkpoint is step {saved} in {run.checkpoints}." if run and saved else "No checkpoint yet."
    remedy = "mixed_precision bf16 or no" if settings.mixed_precision == "fp16" else "a smaller training.learning_rate"
    return f"The loss is {loss} at step {step}. {last} Try {remedy}."


def _stopped(step: int, total: int, run: RunFolder) -> str:
    return f"Stopped at step {step} of {total}; saved in {run.path}. Go on with training.resume=true."


@contextlib.contextmanager
def _out_of_memory_hint(settings: TrainingSettings) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = []
        if not settings.gradient_checkpointing:
            ways.append("training.gradient_checkpointing=true")
        if settings.mixed_precision in (None, "no"):
            ways.append("training.mixed_precision=bf16")
        if settings.batch_size > 1:
            ways.append("training.batch_size=1 with training.gradient_accumulation")
        ways.append("a smaller data.resolution")
        raise TrainingFailed(f"Out of memory ({str(error).splitlines()[0]}) Try {', '.join(ways)}.") from error


def _flat_json(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name, inner in values.items() for key, value in _flat_json(inner, f"{prefix}{name}.").items()}


def _flat(config: Settings) -> dict[str, int | float | str | bool]:
    """The settings as trackers take them."""
    flat = _flat_json(config.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in flat.items()}

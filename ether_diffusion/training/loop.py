"""The training loop. It knows no task and no method: a task brings the module to train, its data and its files."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ether_diffusion.config import Settings
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError
from ether_diffusion.progress import progress_bar
from ether_diffusion.randomness import derive_seed

from .checkpoint import Checkpoint, find_checkpoint, flatten, save_checkpoint
from .environment import StopRequest, peak_memory
from .optimizers import make_optimizer
from .resuming import SET_ASIDE, check_resumable, set_aside_after
from .run_folder import RunFolder
from .schedule import Plan
from .settings import TrainingSettings
from .sharding import share_out


class Task(Protocol):
    """What the loop needs of a task."""

    module: nn.Module
    """Everything that is trained, in one module. `module(batch)` gives losses by name; the one named `loss` counts."""
    dataset: Any
    """Samples by global sample index, from 0 on without end; `len` is the size of an epoch."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Trained parameters for the optimiser, each group with its `lr`."""
        ...

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch."""
        ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What happens to a batch outside of the trained module: frozen encoders, noise."""
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


class Diverged(TrainingFailed):
    """The loss is not finite: the same settings would end the same way."""


@dataclass(frozen=True)
class Report:
    """What a run says of itself."""

    steps_taken: int
    loss: float
    """Of the last step; nan if none was taken."""
    seconds_per_step: float
    """The median, without checkpoints and validation; nan if no step was taken."""
    peak_memory: int
    """Bytes, of tensors on an accelerator, or of the whole process on the CPU."""


class Trainer:
    """One run of one task.

    Args:
        plan: Steps and samples, as the task has laid out its data for them, and as this process sees them.
        config: All settings of the run, kept with it and compared when it resumes.
        run: Where its files go; None for a trial of one step that writes nothing.
        validate_every: Steps between validations, the first before training; None for none.

    Raises:
        UserError: there is nothing to resume from, or not with these settings.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        accelerator: Accelerator,
        *,
        plan: Plan,
        config: Settings,
        seed: int,
        run: RunFolder | None,
        validate_every: int | None = None,
    ) -> None:
        self.task, self.settings, self.accelerator, self.seed, self.run = task, settings, accelerator, seed, run
        self.config, self.validate_every = config, validate_every
        self.plan = plan

        assert settings.learning_rate is not None
        groups = task.parameter_groups(settings.learning_rate)
        self.rates = [group["lr"] for group in groups]
        optimizer = make_optimizer(settings, groups)
        self.trained = {name: p for name, p in task.module.named_parameters() if p.requires_grad}

        checkpoint = self._checkpoint()
        if checkpoint is not None:
            task.load(checkpoint.folder)
        self.average = None
        if settings.ema_decay is not None:
            self.average = EMAModel(self.trained.values(), decay=settings.ema_decay)
            if checkpoint is not None:  # the adapter just loaded is the average
                self.average.optimization_step = checkpoint.trainer["averaged_steps"]
                checkpoint.load_trained(self.trained)
        self.processes = share_out(accelerator, task.module, optimizer)
        self.optimizer = self.processes.optimizer
        if checkpoint is not None:
            checkpoint.load_optimizer(self.optimizer.optimizer)
            if accelerator.scaler is not None and checkpoint.trainer["scaler"]:
                accelerator.scaler.load_state_dict(checkpoint.trainer["scaler"])
            accelerator.print(f"Resuming {checkpoint.folder}, step {checkpoint.step} of {self.plan.steps}.")
        if self.average is not None:
            self.average.to(accelerator.device)
        self.start = checkpoint.step if checkpoint else 0
        self.saved = self.start if checkpoint else None

    def train(self) -> Report:
        """Train to the last step.

        Raises:
            Interrupted: a signal came; the step in hand was finished and a checkpoint written.
            Diverged: the loss is not finite.
            TrainingFailed: memory ran out.
        """
        stop_at = self.plan.steps if self.run else self.start + 1
        batches = self._batches(stop_at)
        durations, losses = [], {"loss": math.nan}
        main = self.accelerator.is_main_process
        bar = progress_bar(stop_at, "training", "step", initial=self.start, shown=main)
        with self._files(), StopRequest().listening() as stop, self._out_of_memory_hint(), bar:
            if self.start == 0:
                self._validate(0)
            for step in range(self.start + 1, stop_at + 1):
                began = time.perf_counter()
                losses, norm = self._step(step, batches)
                durations.append(time.perf_counter() - began)

                rate = self.rates[0] * self.plan.factor(step - 1)
                bar.update()
                bar.set_postfix(loss=f"{losses['loss']:.4f}", lr=f"{rate:.2g}")
                if self.run is None:
                    break
                self._log(step, {**losses, "learning_rate": rate, "grad_norm": norm}, durations[-1])

                signum = self._agreed(stop.requested())
                if step % self.settings.checkpoint_every == 0 or step == stop_at or signum:
                    self._save(step)
                if signum and step < stop_at:
                    raise Interrupted(signum, self._stopped(step))
                self._validate(step)
        if self.run is not None and self.accelerator.is_main_process:
            with self._averaged():
                self.task.save(self.run.path, stop_at)
        self.accelerator.wait_for_everyone()
        pace = statistics.median(durations) if durations else math.nan
        return Report(len(durations), losses["loss"], pace, peak_memory(self.accelerator.device))

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, float], float]:
        """One optimiser step: losses by name, averaged over its samples, and the gradient's norm before clipping."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.plan.factor(step - 1)
        sums: dict[str, Tensor] = {}
        for part in range(self.plan.parts):
            batch = self.task.prepare(next(batches))
            # Dropout draws from torch's global generator: make that a function of the step too.
            position = (step - 1) * self.plan.parts + part
            torch.manual_seed(derive_seed(self.seed, f"module/{self.plan.rank}", position))
            losses = self.processes.gradients(batch, self.plan.parts, last=part == self.plan.parts - 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.plan.parts
        means = {name: self._mean(value) for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise Diverged(self._not_finite(step, means["loss"]))
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.trained.values())
        return means, float(norm)

    def _checkpoint(self) -> Checkpoint | None:
        if self.run is None or not self.settings.resume:
            return None
        checkpoint = find_checkpoint(self.run.checkpoints, self.settings.resume, self.accelerator.print)
        if checkpoint is None:
            return None
        samples, constant = self.plan.samples_per_step, self.settings.schedule == "constant"
        check_resumable(checkpoint, self.config, samples, self.accelerator.mixed_precision, constant)
        if checkpoint.step > self.plan.steps:
            taken = f"the {checkpoint.step} that {checkpoint.folder} has taken"
            raise UserError(f"training.steps: {self.plan.steps} is less than {taken}.")
        return checkpoint

    def _batches(self, stop_at: int) -> Iterator[dict[str, Any]]:
        return iter(
            DataLoader(
                self.task.dataset,
                batch_sampler=self.plan.batches(self.start, stop_at),  # pyright: ignore[reportArgumentType]
                collate_fn=self.task.collate,
                num_workers=self.settings.workers,
                # The workers' base seed would otherwise be drawn from the global generator.
                generator=torch.Generator().manual_seed(0),
            )
        )

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        """The run folder and the trackers, open while training goes on."""
        if self.run is None:
            yield
            return
        if self.accelerator.is_main_process:
            self.run.create(self.config)
            self.run.drop_metrics_after(self.start)
            later = set_aside_after(self.run.checkpoints, self.start)
            if later:
                place = self.run.checkpoints / SET_ASIDE
                self.accelerator.print(f"Set aside: {', '.join(later)}, after step {self.start}, into {place}.")
        self.accelerator.wait_for_everyone()
        if self.settings.tracker != "none":
            flat = flatten(self.config.model_dump(mode="json"))
            simple = {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in flat.items()}
            self.accelerator.init_trackers("ether_diffusion", simple)
        try:
            yield
        finally:
            if self.settings.tracker != "none":
                self.accelerator.end_training()

    def _log(self, step: int, values: dict[str, float], seconds: float) -> None:
        assert self.run is not None
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.accelerator.log(finite, step=step)
        if self.accelerator.is_main_process:
            # JSON has no infinity: the norm of an overflowed fp16 step is null
            row = {name: finite.get(name) for name in values}
            self.run.log({"step": step, **row, "seconds": round(seconds, 4)})

    def _save(self, step: int) -> None:
        assert self.run is not None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler

            def save_weights(folder: Path) -> None:
                with self._averaged():
                    self.task.save(folder, step)

            save_checkpoint(
                self.run.checkpoints,
                step,
                save_weights=save_weights,
                optimizer=self.optimizer.optimizer,
                trained=self.trained if self.average else None,
                trainer={
                    "settings": self.config.model_dump(mode="json"),
                    "samples_per_step": self.plan.samples_per_step,
                    "mixed_precision": self.accelerator.mixed_precision,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "averaged_steps": self.average.optimization_step if self.average else 0,
                },
                keep_states=self.settings.keep_states,
                keep_checkpoints=self.settings.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()
        self.saved = step

    def _validate(self, step: int) -> None:
        if self.run is None or not self.validate_every:
            return
        if step % self.validate_every and step != self.plan.steps:
            return
        picture = f"step-{step:06d}.png"
        if self.accelerator.is_main_process:
            with self._averaged():
                values = self.task.validate(step, self.run.samples / picture)
            nan, black = values.get("nan_images", 0), values.get("black_images", 0)
            if nan or black:
                self.accelerator.print(f"Step {step}: {nan:.0f} validation images are NaN, {black:.0f} are black.")
            self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=step)
        elif self.processes.draw_together:
            with self._averaged(), tempfile.TemporaryDirectory() as aside:  # pictures that nobody looks at
                self.task.validate(step, Path(aside) / picture)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average in the place of the trained weights, which come back bit for bit."""
        if self.average is None:
            yield
            return
        self.average.store(self.trained.values())
        self.average.copy_to(self.trained.values())
        try:
            yield
        finally:
            self.average.restore(self.trained.values())

    def _mean(self, value: Tensor) -> float:
        """Over the processes."""
        return float(self.accelerator.reduce(value, "mean"))  # pyright: ignore[reportArgumentType]

    def _agreed(self, signum: int) -> int:
        """The same answer in every process, so that all stop at the same step."""
        if self.accelerator.num_processes == 1:
            return signum
        flag = torch.tensor([float(signum)], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())  # pyright: ignore[reportAttributeAccessIssue]

    def _stopped(self, step: int) -> str:
        assert self.run is not None
        again = f"output_dir={self.run.path} training.resume=true"
        return f"Stopped after step {step} of {self.plan.steps}, saved. Go on with {again}"

    def _not_finite(self, step: int, loss: float) -> str:
        kept = f"The last good checkpoint is step {self.saved}." if self.saved else "There is no checkpoint yet."
        half = self.accelerator.mixed_precision == "fp16"
        remedy = "training.mixed_precision=bf16 or no" if half else "a smaller training.learning_rate"
        return f"The loss is {loss} at step {step}. {kept} Try {remedy}."

    @contextlib.contextmanager
    def _out_of_memory_hint(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
                raise
            settings, ways = self.settings, []
            if not settings.gradient_checkpointing:
                ways.append("training.gradient_checkpointing=true")
            if self.accelerator.mixed_precision == "no":
                ways.append("training.mixed_precision=bf16")
            if settings.batch_size > 1:
                ways.append("training.batch_size=1 with training.gradient_accumulation")
            ways.append("a smaller data.resolution")
            raise TrainingFailed(f"Out of memory ({str(error).splitlines()[0]}). Try {', '.join(ways)}.") from error

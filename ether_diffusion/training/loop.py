"""The training loop. It knows no task, no method and no base: a task supplies the trained module, batches and files."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader

from ether_diffusion.adapters.certify import Watch
from ether_diffusion.errors import Interrupted
from ether_diffusion.files import checkpoint_name
from ether_diffusion.progress import progress_bar
from ether_diffusion.randomness import derive_seed, seed_all

from .averaging import Average
from .checkpoint import save_checkpoint
from .compiling import compile_errors, compile_repeated_blocks, uncompiled
from .config import TaskConfig
from .environment import StopNow, StopRequest, ignore_signals, out_of_memory_hint, peak_memory
from .optimizers import MaskedAdamW, make_optimizer
from .profiling import DATA, INPUTS, MODULE, UPDATE, profiling
from .resuming import checkpoint_to_resume
from .run_folder import RunFolder
from .schedule import Plan
from .sharding import share_out
from .step_log import NORM, Diverged, StepLog
from .task import Report, Task

READ_EVERY = 10
"""Steps on an accelerator, where a read makes the host wait; a CPU computes and reads in one thread."""

DONE = 1000
"""What the main process answers in the place of a signal's number, which is smaller, when it has validated."""


class Trainer:
    """One run of one task.

    Args:
        config: All settings of the run, kept in its checkpoints and compared when it resumes.
        plan: Steps and samples, as this process sees them.
        run: Where its files go; None: a dry run of one step that writes nothing.
        packed: Whether `steps` yields batches, for a caller that computes the gradients of several runs at once.

    Raises:
        UserError: there is no checkpoint to resume from, or it was trained with other settings.
    """

    def __init__(
        self,
        task: Task[Any],
        config: TaskConfig,
        accelerator: Accelerator,
        plan: Plan,
        run: RunFolder | None,
        packed: bool = False,
    ) -> None:
        self.packed = packed
        self.task, self.config, self.settings = task, config, config.training
        self.accelerator, self.plan, self.run = accelerator, plan, run

        assert self.settings.learning_rate is not None
        groups = task.parameter_groups(self.settings.learning_rate)
        self.rates = [group["lr"] for group in groups]
        optimizer = make_optimizer(self.settings, groups, accelerator.device)
        self.trained = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
        self.watch = task.watch = Watch(task.module, start_faults=task.start_faults)

        # A checkpoint's weights are loaded before the module is placed on devices, its optimiser state after that.
        self.inputs = task.inputs() if run else {}
        checkpoint = checkpoint_to_resume(config, run.checkpoints, plan, accelerator, self.inputs) if run else None
        if checkpoint is not None:
            task.load(checkpoint.folder)
        self.average = None
        if self.settings.ema_decay is not None:
            self.average = Average(self.trained.values(), decay=self.settings.ema_decay)
            if checkpoint is not None:  # the weights just loaded are the average
                self.average.optimization_step = checkpoint.trainer["averaged_steps"]
                checkpoint.load_trained(self.trained)
        if checkpoint is not None:
            self.watch.resume(checkpoint.watched())
        self.compiled_blocks = compile_repeated_blocks(task.module) if self.settings.compile else 0
        self.processes = share_out(accelerator, task.module, optimizer)
        self.optimizer = self.processes.optimizer
        if checkpoint is not None:
            checkpoint.load_optimizer(self.optimizer.optimizer)
            if accelerator.scaler is not None and checkpoint.trainer["scaler"]:
                accelerator.scaler.load_state_dict(checkpoint.trainer["scaler"])
            accelerator.print(f"Resuming {checkpoint.folder}, step {checkpoint.step} of {plan.steps}.")
        if self.average is not None:
            self.average.to(accelerator.device)
        self.start = checkpoint.step if checkpoint else 0
        self.saved = self.start if checkpoint else None
        self.log = StepLog(accelerator, run, lambda step: self.rates[0] * plan.factor(step - 1))
        self.whole: Tensor | None = None
        """All trained weights in one tensor, with their gradient, if a pack keeps them so."""
        self.read_every = self.settings.log_every or (1 if accelerator.device.type == "cpu" else READ_EVERY)

    def use_whole(self, weights: Tensor, gradients: Tensor) -> None:
        """Take what is done to all trained weights to one tensor, of which they are views, as their gradients are."""
        self.whole = weights.detach()
        self.whole.grad = gradients
        if isinstance(self.optimizer.optimizer, MaskedAdamW):
            self.optimizer.optimizer.use_whole(self.whole)
        if self.average is not None:
            self.average.use_whole(self.whole, self.trained.values())

    def train(self) -> Report:
        """Train to the last step.

        Raises:
            Interrupted: a signal came; the current step was finished and a checkpoint written.
            Diverged: a loss, its gradient, or a weight at a checkpoint, is not finite.
            TrainingFailed: memory ran out, or torch cannot compile the model.
        """
        with StopRequest().listening() as stop:
            steps = self.steps(stop)
            try:
                while True:
                    next(steps)
            except StopIteration as end:
                return end.value

    def steps(self, stop: StopRequest) -> Generator[dict[str, Any] | None, Any, Report]:
        """What `train` does. A packed run yields None before each step, and is sent the signal to stop at, or 0; and
        each prepared batch, for which it is sent the losses once the trained weights have their gradients."""
        accelerator, settings, run = self.accelerator, self.settings, self.run
        stop_at = self.plan.steps if run else self.start + 1
        self.loss, self.seconds = math.nan, list[float]()

        files = run.open(self.config, accelerator, self.start) if run else contextlib.nullcontext()
        hint = out_of_memory_hint(settings, accelerator.mixed_precision)
        main, alone, compiles = accelerator.is_main_process, accelerator.num_processes == 1, self.compiled_blocks > 0
        bar = progress_bar(stop_at, "training", "step", initial=self.start, shown=main and not self.packed)
        # Closed: an error's traceback would keep the workers, whom no signal ends, and the process would wait for them.
        loading = contextlib.closing(self._batches(stop_at))
        traces = run.logs if run and main else None
        with (
            files,
            hint,
            compile_errors(compiles),
            bar,
            profiling(settings.profile, traces, self.start + 1, accelerator.print) as end_of_step,
            loading as batches,
        ):
            if self._lacks_sheet(self.start, stop_at):
                self._validate_until_stopped(self.start, stop)

            try:
                for step in range(self.start + 1, stop_at + 1):
                    if self.packed and (signum := (yield None)):
                        raise self._stopped(signum, step - 1)
                    # The step, with its time. On an accelerator it may still run when the next one begins.
                    began = time.perf_counter()
                    values = yield from self._step(step, batches)
                    self.log.add(step, values, time.perf_counter() - began)
                    bar.update()
                    end_of_step()

                    # Its numbers: every so many steps, and before anything is written or the run ends.
                    is_last, is_first = step == stop_at, step == self.start + 1
                    saves = is_last or step % settings.checkpoint_every == 0
                    validates = is_last or step % self.config.validation.every == 0
                    reads = saves or validates or step % self.read_every == 0 or (is_first and compiles)
                    signum = self._agreed(stop.requested()) if reads or alone else 0
                    if reads or signum:
                        self._read(bar)
                    if run is None:
                        break

                    # A checkpoint: every so many steps, at the end, and before an interruption.
                    if saves or signum:
                        self._save(step)
                    if signum and not is_last:
                        raise self._interrupted(signum, step)

                    # Validation images: every so many steps, and at the end.
                    if validates:
                        self._validate_until_stopped(step, stop)
            except BaseException:
                with contextlib.suppress(Exception):  # the numbers of the steps before it
                    self._read(bar)
                raise

        # The result, where the run's users look for it.
        certificate = None
        if run is not None and main:
            with self._averaged():
                self.task.save(run.path, stop_at)
                certificate = self.task.certificate or self.task.watched()
        accelerator.wait_for_everyone()
        pace = statistics.median(self.seconds) if self.seconds else math.nan
        return Report(len(self.seconds), self.loss, pace, peak_memory(accelerator.device), certificate)

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> Generator[dict[str, Any], Any, dict[str, Tensor]]:
        """One optimiser step: losses by name, averaged over its samples, and the gradient's norm before clipping.

        Nothing here waits for the device. Where loss or gradient are not finite, the step changes nothing.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.plan.factor(step - 1)
        sums: dict[str, Tensor] = {}
        for part in range(self.plan.parts):
            with record_function(DATA):
                batch = next(batches)
            with record_function(INPUTS):
                batch = self.task.prepare(batch)
            # Dropout uses torch's global generator: make that a function of the step too.
            position = (step - 1) * self.plan.parts + part
            seed_all(derive_seed(self.config.seed, f"module/{self.plan.rank}", position), self.accelerator.device)
            if self.packed:
                losses = yield batch
            else:
                with record_function(MODULE):
                    losses = self.processes.gradients(batch, self.plan.parts, last=part == self.plan.parts - 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.plan.parts
        with record_function(UPDATE):
            means = self._means(sums)
            limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
            self.accelerator.unscale_gradients(self.optimizer)
            self.watch.observe()
            norm = nn.utils.clip_grad_norm_(self.trained.values() if self.whole is None else self.whole, limit)
            self._update(means["loss"].isfinite() & norm.isfinite())
            if self.whole is None:
                self.optimizer.zero_grad(set_to_none=True)
            else:
                cast(Tensor, self.whole.grad).zero_()
        return {**means, NORM: norm}

    def _update(self, accepted: Tensor) -> None:
        """Change weights, moments and averages, if the step is accepted."""
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, MaskedAdamW):
            optimizer.refused = (~accepted).float()
            # accelerate's own step does nothing more, and takes longer than this one: it looks for packages.
            (optimizer if self.accelerator.scaler is None else self.optimizer).step()
        elif self.accelerator.scaler is not None or bool(accepted):  # a scaler refuses steps by itself
            self.optimizer.step()
        if self.average is not None:
            self.average.update(self.trained.values(), accepted)

    def _read(self, bar: Any) -> None:
        """Wait for the steps since the last read, log their numbers and show the last ones.

        Raises:
            Diverged: as `StepLog.read`.
        """
        try:
            for numbers in self.log.read():
                self.loss = numbers.losses["loss"]
                self.seconds.append(numbers.seconds)
                bar.set_postfix(loss=f"{self.loss:.4f}", lr=f"{numbers.rate:.2g}", refresh=False)
                if self.compiled_blocks and len(self.seconds) == 1:
                    took = f"{numbers.seconds:.0f} s"
                    self.accelerator.print(
                        f"Compiled: {self.compiled_blocks} blocks, in the first step, which took {took}"
                    )
        except Diverged as error:
            raise Diverged(f"{error} {self._remedy()}") from None

    def _batches(self, stop_at: int) -> Generator[dict[str, Any], None, None]:
        yield from DataLoader(
            self.task.dataset,
            batch_sampler=self.plan.batches(self.start, stop_at),  # pyright: ignore[reportArgumentType]
            collate_fn=self.task.collate,
            num_workers=self.settings.workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.accelerator.device.type == "cuda",
            # Without it, the workers' base seed would come from the global generator.
            generator=torch.Generator().manual_seed(0),
        )

    def _save(self, step: int) -> None:
        assert self.run is not None
        if not torch.stack([weight.isfinite().all() for weight in self.trained.values()]).all():
            raise Diverged(f"Trained weights are NaN or infinite at step {step}. {self._remedy()}")
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
                watched=self.watch.state(),
                trainer={
                    "settings": self.config.model_dump(mode="json"),
                    "inputs": self.inputs,
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

    def _lacks_sheet(self, step: int, stop_at: int) -> bool:
        """Whether a run that begins after `step` has yet to validate that step, or was stopped before it could."""
        if self.run is None or not self.config.validation.enabled:
            return False
        is_due = step % self.config.validation.every == 0 or step == stop_at
        return is_due and bool(self._agreed(not (self.run.samples / f"{checkpoint_name(step)}.png").is_file()))

    def _validate_until_stopped(self, step: int, stop: StopRequest) -> None:
        """Validate; a signal ends that within seconds, after a checkpoint. A resumed run makes up for the sheet."""
        try:
            self._validate(step, stop)
        except StopNow:
            raise self._stopped(stop.signum, step) from None

    def _stopped(self, signum: int, step: int) -> Interrupted:
        """As `_interrupted`, with a checkpoint of a step that may have none yet."""
        if step > self.start and self.saved != step:
            self._save(step)
        return self._interrupted(signum, step)

    def _interrupted(self, signum: int, step: int) -> Interrupted:
        assert self.run is not None
        done = f"Stopped after step {step} of {self.plan.steps}" + (", with a checkpoint." if self.saved else ".")
        return Interrupted(signum, f"{done} Resume with output_dir={self.run.path} training.resume=true")

    def _validate(self, step: int, stop: StopRequest) -> None:
        """Generate validation images; in all processes where a forward pass of the base needs them.

        Raises:
            StopNow: a signal came; in all processes, whichever got it.
        """
        if self.run is None or not self.config.validation.enabled:
            return
        main, together = self.accelerator.is_main_process, self.processes.sample_together
        if not main and not together:
            self._wait_for_validation(stop)
            return
        with contextlib.ExitStack() as opened:
            picture = self.run.samples / f"{checkpoint_name(step)}.png"
            if not main:
                picture = Path(opened.enter_context(tempfile.TemporaryDirectory())) / picture.name
            opened.enter_context(self._averaged())
            opened.enter_context(uncompiled(self.compiled_blocks > 0))
            opened.enter_context(self._stopping_together(stop))
            values = self.task.validate(step, picture)
        if main:
            nan, black = values.get("nan_images", 0), values.get("black_images", 0)
            if nan or black:
                self.accelerator.print(f"Step {step}: {nan:.0f} validation images are NaN, {black:.0f} are black.")
            self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=step)
            if not together:
                self._agreed(DONE)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _stopping_together(self, stop: StopRequest) -> Iterator[None]:
        """Within the block a signal to any process raises StopNow in all of them.

        One process stops wherever it is. Several ask one another before each forward pass of a model in training: those
        that wait for the main process as often as those that sample with it.
        """
        if self.accelerator.num_processes == 1:
            with stop.stopping_at_once():
                yield
            return

        def ask(*_: Any) -> None:
            if signum := self._agreed(stop.requested()):
                stop.signum = signum
                raise StopNow

        # Before the hooks that gather shards.
        hooks = [model.register_forward_pre_hook(ask, prepend=True) for model in self.task.module.children()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _wait_for_validation(self, stop: StopRequest) -> None:
        """Answer the main process, which samples alone, until it is done. Raises StopNow, as it does."""
        while (answer := self._agreed(stop.requested())) != DONE:
            if answer:
                stop.signum = answer
                raise StopNow
        self.accelerator.wait_for_everyone()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.in_place_of(self.trained.values()) if self.average else contextlib.nullcontext()

    def _means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over the processes, in one message."""
        if self.accelerator.num_processes == 1:
            return values
        stacked: Any = self.accelerator.reduce(torch.stack(list(values.values())), "mean")  # pyright: ignore
        return dict(zip(values, stacked.unbind(), strict=True))

    def _agreed(self, signum: int) -> int:
        """The same signal in every process, so that all stop at the same step; 0: none."""
        if self.accelerator.num_processes == 1:
            return signum
        flag = torch.tensor([float(signum)], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())  # pyright: ignore[reportAttributeAccessIssue]

    def _remedy(self) -> str:
        kept = f"The last good checkpoint is step {self.saved}." if self.saved else "There is no checkpoint yet."
        half = self.accelerator.mixed_precision == "fp16"
        return f"{kept} Try {'training.mixed_precision=bf16 or no' if half else 'a smaller training.learning_rate'}."

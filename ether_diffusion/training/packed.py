"""Packed training: runs that differ in data, seed and rate share every pass of the base, and nothing else.

A sample's adapter is a few vectors a layer, so that a batch can hold the samples of many runs. Each run is a `Trainer`
of its own, with its task, optimiser, schedule, average and folder; its steps stop where they need gradients. Then one
pass of the base serves all runs that wait, and each gets the losses and gradients of its own samples: another run's
numbers, finite or not, enter none of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ether_diffusion.errors import Interrupted, TrainingFailed, UserError
from ether_diffusion.ether import EtherConfig
from ether_diffusion.ether.stacked import Stacked
from ether_diffusion.models.families.family import Family
from ether_diffusion.progress import progress_bar

from .environment import StopRequest
from .loop import Trainer
from .task import Report

Batch = dict[str, Any]
Outcome = Report | Exception
"""Of a run: its report; or what stopped it, a failure or an interruption."""


class SharedPass(nn.Module):
    """One pass of the base over the batches of several runs.

    Args:
        denoiser: Runs the batches, with the layers of `Stacked`.
        modules: Each run's `DenoisingLoss`, for the loss of its own samples. They are no parts of this module.
    """

    def __init__(self, denoiser: nn.Module, modules: Sequence[Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.runs = tuple(modules)

    def forward(self, batches: Mapping[int, Batch]) -> list[dict[str, Tensor]]:
        """The losses by name of each run's batch, all of which have one shape."""
        family = self.runs[0].family
        names = _inputs(next(iter(batches.values())), family)
        noisy, timesteps, *others = (torch.cat([batch[name] for batch in batches.values()]) for name in names)
        conditioning = dict(zip(names[2:], others, strict=True))
        prediction = family.denoise(self.denoiser, noisy, timesteps, conditioning)
        shares = zip(batches.items(), prediction.chunk(len(batches)), strict=True)
        return [self.runs[run].losses(share, batch) for (run, batch), share in shares]


class Pack:
    """Trainers whose runs share passes.

    Args:
        denoiser: The base's without adapters, of whose tensors those of all runs' are; changed in place.
        config: Of their adapters.
        trainers: Packed ones, each with an adapter on its task's UNet.
    """

    def __init__(
        self, denoiser: nn.Module, config: EtherConfig, trainers: Sequence[Trainer], accelerator: Accelerator
    ) -> None:
        self.trainers = trainers
        self.stacked = Stacked(denoiser, config, [trainer.task.base.denoiser for trainer in trainers])
        for trainer, weights, gradients in zip(trainers, self.stacked.weights, self.stacked.gradients, strict=True):
            trainer.use_whole(weights, gradients)
        self.module = accelerator.prepare(SharedPass(denoiser, [trainer.task.module for trainer in trainers]))

    def gradients(self, batches: Mapping[int, Batch]) -> dict[int, dict[str, Tensor]]:
        """Add the gradients of batches, by the indices of their runs, to the runs' trained weights.

        Returns:
            The losses of each.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for runs in _alike(batches, self.trainers[0].task.base.family):
            with self.stacked.take(runs):
                losses = self.module({run: batches[run] for run in runs})
                # A sum, so that the gradient of each loss is one, whatever the others are.
                torch.stack(
                    [self._scaled(run, each["loss"]) for run, each in zip(runs, losses, strict=True)]
                ).sum().backward()
            for run, each in zip(runs, losses, strict=True):
                found[run] = {name: value.detach() for name, value in each.items()}
        return found

    def _scaled(self, run: int, loss: Tensor) -> Tensor:
        trainer = self.trainers[run]
        scaler, loss = trainer.accelerator.scaler, loss / trainer.plan.parts
        return loss if scaler is None else scaler.scale(loss)


def train_together(pack: Pack, names: Sequence[str], say: Callable[[str], None]) -> list[Outcome]:
    """Train the runs of a pack to their last steps. One that fails is set aside, and the others continue.

    A signal stops all of them, each after its step in hand, with a checkpoint.

    Args:
        names: Of the runs, for messages.
        say: Called with a line for each run that is set aside.

    Returns:
        The outcomes, in the order of the runs.
    """
    outcomes: dict[int, Outcome] = {}
    waiting: dict[int, Batch | None] = {}
    """What each run has yielded: a batch, or None before a step."""
    left = max(trainer.plan.steps - trainer.start for trainer in pack.trainers)
    with (
        contextlib.ExitStack() as opened,
        StopRequest().listening() as stop,
        progress_bar(left, f"training {len(names)} runs", "step") as bar,
    ):
        steps = [opened.enter_context(contextlib.closing(trainer.steps(stop))) for trainer in pack.trainers]

        def advance(run: int, sent: Any) -> None:
            """Let a run do what it does between two passes."""
            waiting.pop(run, None)
            try:
                waiting[run] = steps[run].send(sent)
            except StopIteration as end:
                outcomes[run] = end.value
            except Interrupted as error:
                outcomes[run] = error
            except (TrainingFailed, UserError, OSError) as error:
                outcomes[run] = error
                say(f"Set aside: {names[run]}: {error}")

        for run, trainer in enumerate(pack.trainers):
            if signum := stop.requested():  # before its first images
                outcomes[run] = Interrupted(signum, f"Not started: output_dir={trainer.config.output_dir}")
            else:
                advance(run, None)
        while waiting:
            signum = stop.requested()  # the same for all, so that they stop after the same step
            for run in tuple(waiting):
                advance(run, signum)
            while batches := {run: batch for run, batch in waiting.items() if batch is not None}:
                for run, losses in pack.gradients(batches).items():
                    advance(run, losses)
            bar.set_postfix(runs=len(waiting), refresh=False)
            bar.update()
    return [outcomes[run] for run in range(len(names))]


def _inputs(batch: Batch, family: Family) -> tuple[str, ...]:
    """Names of the tensors of a batch that the denoiser gets."""
    conditioning = (*family.conditioning, *family.conditioning_of_frames)
    return "noisy_latents", "timesteps", *(name for name in conditioning if name in batch)


def _alike(batches: Mapping[int, Batch], family: Family) -> list[list[int]]:
    """The runs in groups whose batches have one shape: crops in buckets and class images may differ."""

    def shapes(run: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(batches[run][name].shape) for name in _inputs(batches[run], family))

    runs = sorted(batches, key=lambda run: (shapes(run), run))
    return [list(group) for _, group in itertools.groupby(runs, shapes)]

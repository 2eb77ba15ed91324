"""The plan of a run: the number of steps, and the samples and learning rate of each, as functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler

from .config import TrainingSettings


@dataclass(frozen=True)
class Plan:
    """The steps of a run, as one of its processes sees them."""

    steps: int
    batch_size: int
    parts: int
    """Forward passes per step and process."""
    processes: int
    rank: int
    factor: Callable[[int], float]
    """The schedule: number of steps already taken -> factor on the learning rate."""

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.parts * self.processes

    def batches(self, start: int, stop: int) -> Iterator[list[int]]:
        """The batches of this process for the steps after `start`, up to `stop`, as lists of global sample indices.

        The step after s others has the samples from s * samples_per_step on, whatever the number of processes.
        """
        for step in range(start, stop):
            for part in range(self.parts):
                first = step * self.samples_per_step + (part * self.processes + self.rank) * self.batch_size
                yield list(range(first, first + self.batch_size))


def make_plan(settings: TrainingSettings, samples: int, processes: int = 1, rank: int = 0) -> Plan:
    """The plan for a data set of `samples` per epoch."""
    per_step = settings.batch_size * settings.gradient_accumulation * processes
    steps = settings.steps or math.ceil((settings.epochs or 0) * samples / per_step)
    return Plan(
        steps, settings.batch_size, settings.gradient_accumulation, processes, rank, rate_factor(settings, steps)
    )


def rate_factor(settings: TrainingSettings, steps: int) -> Callable[[int], float]:
    """diffusers' schedule of that name: number of steps already taken -> factor on the learning rate."""
    name: str = settings.schedule
    if name == "constant" and settings.warmup_steps:
        name = "constant_with_warmup"
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(name, unused, num_warmup_steps=settings.warmup_steps, num_training_steps=steps)
    return schedule.lr_lambdas[0]

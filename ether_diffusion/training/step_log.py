"""Losses and gradient norms of the steps since the last read, which stay on the device until then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ether_diffusion.errors import TrainingFailed

from .run_folder import RunFolder

NORM = "grad_norm"


class Diverged(TrainingFailed):
    """The loss, its gradient or a trained weight is not finite: the same settings would end the same way."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step computed, as numbers."""

    step: int
    losses: dict[str, float]
    norm: float
    rate: float
    seconds: float
    """On an accelerator, with its share of the wait at the read."""


class StepLog:
    """Takes scalars on the device, and reads many steps' in one copy: reading waits until the steps have run.

    Args:
        run: Whose `metrics.jsonl` gets a line a step; None: none does.
        rate: The learning rate of a step.
    """

    def __init__(self, accelerator: Accelerator, run: RunFolder | None, rate: Callable[[int], float]) -> None:
        self.accelerator, self.run, self.rate = accelerator, run, rate
        self.unread: list[tuple[int, dict[str, Tensor], float]] = []

    def add(self, step: int, values: dict[str, Tensor], seconds: float) -> None:
        """Keep a step's losses and `grad_norm`, which took the host so long to compute or, on a GPU, to launch."""
        self.unread.append((step, values, seconds))

    def read(self) -> Iterator[StepNumbers]:
        """Wait for the steps that were added since the last read; log and yield their numbers.

        Raises:
            Diverged: names the first of them that was refused because its loss or gradient is not finite, unless an
                overflow in fp16 may be the reason.
        """
        steps, self.unread = self.unread, []
        if not steps:
            return
        began = time.perf_counter()
        scalars = iter(torch.stack([value for _, values, _ in steps for value in values.values()]).tolist())
        waited = (time.perf_counter() - began) / len(steps)
        for step, values, seconds in steps:
            found = {name: next(scalars) for name in values}
            norm, loss = found.pop(NORM), found["loss"]
            if not math.isfinite(loss):
                raise Diverged(f"The loss is {loss} at step {step}.")
            if self.accelerator.scaler is None and not math.isfinite(norm):
                raise Diverged(f"The gradient's norm is {norm} at step {step}.")
            numbers = StepNumbers(step, found, norm, self.rate(step), seconds + waited)
            if self.run is not None:
                row = {**found, "learning_rate": numbers.rate, NORM: norm}
                self.run.log(self.accelerator, step, row, numbers.seconds)
            yield numbers

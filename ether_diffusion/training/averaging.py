"""The average of the trained weights that is saved and validated with (`training.ema_decay`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .optimizers import view_like


class Average(EMAModel):
    """diffusers' exponential moving average, which a refused step does not move.

    At the k-th step, s <- s - (1 - d) (s - w) with d = min(decay, (1 + k) / (10 + k)), and d = 0 at the first.
    """

    _whole: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, parameters: Collection[nn.Parameter], accepted: Tensor) -> None:
        """Take a step.

        Args:
            parameters: Finite weights.
            accepted: Whether the step counts: a scalar on the device, which nobody waits for.
        """
        self.optimization_step += 1
        share = accepted * (1 - self.get_decay(self.optimization_step))
        averages, weights = self.shadow_params, list[Tensor](parameters)
        if self._whole is not None:
            averages, weights = ([tensor] for tensor in self._whole)
        differences = torch._foreach_sub(averages, weights)
        torch._foreach_mul_(differences, share)
        torch._foreach_sub_(averages, differences)

    def use_whole(self, weights: Tensor, parameters: Collection[nn.Parameter]) -> None:
        """Take further steps on one tensor, of which the parameters are views."""
        average = torch.empty_like(weights)
        views = [view_like(average, parameter, weights) for parameter in parameters]
        for view, shadow in zip(views, self.shadow_params, strict=True):
            view.copy_(shadow)
        self.shadow_params, self._whole = views, (average, weights)

    @contextmanager
    def in_place_of(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters have the values of their average; afterwards their own, bit for bit."""
        self.store(parameters)
        self.copy_to(parameters)
        try:
            yield
        finally:
            self.restore(parameters)

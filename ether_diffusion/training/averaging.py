"""The average of the trained weights that is saved and validated with (`training.ema_decay`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Average(EMAModel):
    """diffusers' exponential moving average, which a refused step does not move.

    At the k-th step, s <- s - (1 - d) (s - w) with d = min(decay, (1 + k) / (10 + k)), and d = 0 at the first.
    """

    @torch.no_grad()
    def update(self, parameters: Collection[nn.Parameter], accepted: Tensor) -> None:
        """Take a step.

        Args:
            parameters: Finite weights.
            accepted: Whether the step counts: a scalar on the device, which nobody waits for.
        """
        self.optimization_step += 1
        share = accepted * (1 - self.get_decay(self.optimization_step))
        differences = torch._foreach_sub(self.shadow_params, list(parameters))
        torch._foreach_mul_(differences, share)
        torch._foreach_sub_(self.shadow_params, differences)

    @contextmanager
    def in_place_of(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Within the block the parameters have the values of their average; afterwards their own, bit for bit."""
        self.store(parameters)
        self.copy_to(parameters)
        try:
            yield
        finally:
            self.restore(parameters)

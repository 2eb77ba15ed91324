"""The plan: the same samples at the same rates, however many processes share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler

from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.schedule import make_plan


def settings(**values: Any) -> TrainingSettings:
    return TrainingSettings(**{"steps": 10, **values})


def test_processes_share_the_samples_that_one_process_takes() -> None:
    one = make_plan(settings(batch_size=2, gradient_accumulation=6), samples=5)
    many = [make_plan(settings(batch_size=2, gradient_accumulation=2), 5, processes=3, rank=rank) for rank in range(3)]
    assert one.samples_per_step == many[0].samples_per_step == 12
    for step in range(4):
        alone = sorted(i for batch in one.batches(step, step + 1) for i in batch)
        shared = sorted(i for plan in many for batch in plan.batches(step, step + 1) for i in batch)
        assert alone == shared == list(range(12 * step, 12 * step + 12))


def test_a_later_start_continues_where_an_earlier_stop_ended() -> None:
    plan = make_plan(settings(batch_size=2, gradient_accumulation=3), samples=5)
    assert [*plan.batches(0, 4), *plan.batches(4, 10)] == list(plan.batches(0, 10))
    assert len(list(plan.batches(4, 10))) == 6 * 3


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_diffusers(schedule: str, warmup: int) -> None:
    """diffusers' scripts step once per optimiser step with one process; the plan does with any number."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    plan = make_plan(settings(schedule=schedule, warmup_steps=warmup), samples=5, processes=7)
    for step in range(10):
        assert 2.0 * plan.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_epochs_are_counted_in_samples() -> None:
    plan = make_plan(TrainingSettings(epochs=3, batch_size=2), samples=5, processes=2)
    assert plan.steps == 4  # 15 samples, 4 a step

"""One network's training: AdamW with an average of the weights, resumable, its progress in plain lines and samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ether_diffusion.randomness import generator

SAVE_EVERY, SAY_EVERY = 500, 100


@dataclass(frozen=True)
class Stage:
    """What is trained, and how long.

    Attributes:
        module: Its parameters are trained; the statistics in its buffers are kept as they come.
        loss: Step -> losses by name, of which `loss` counts. Draws its batch from `generator(SEED, name, step)` alone.
        look: Writes samples of the averaged weights into a folder and returns figures to print.
        decay: Of the running average.
    """

    name: str
    module: nn.Module
    loss: Callable[[int], dict[str, Tensor]]
    look: Callable[[Path], dict[str, float]]
    steps: int
    learning_rate: float
    decay: float = 0.998
    weight_decay: float = 0.01
    look_every: int = 1000


def train(stage: Stage, folder: Path, *, start_from: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Train to the end, or from where `folder` says an earlier call stopped. Returns the averaged state, fp32.

    The rate rises over the first 200 steps, stays, and falls linearly to zero over the last third.

    Args:
        start_from: Weights to begin with, where nothing was trained yet.
    """
    path = folder / f"{stage.name}.safetensors"
    parameters = dict(stage.module.named_parameters())
    buffers = {name: tensor for name, tensor in stage.module.state_dict().items() if name not in parameters}
    if start_from is not None:
        stage.module.load_state_dict(start_from)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.99), fused=True)
    start = _restore(path, parameters, average, buffers, optimizer) if path.exists() else 0
    losses: dict[str, Tensor] = {}
    stage.module.train()
    began, since = time.monotonic(), start
    for step in range(start + 1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _factor(step, stage.steps)
        losses = stage.loss(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(stage.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        if step % SAY_EVERY == 0 or step == stage.steps:
            pace = (time.monotonic() - began) / (step - since)
            _say(stage, step, {name: float(value.detach()) for name, value in losses.items()}, pace)
        if step % SAVE_EVERY == 0 or step == stage.steps:
            _store(path, parameters, average, buffers, optimizer, step)
        if step % stage.look_every == 0 or step == stage.steps:
            _look(stage, average, folder / "samples" / f"{stage.name}-{step:06d}", step)
    return {**average, **buffers}


def steps_taken(path: Path) -> int:
    """Of the stage that is kept in this file; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.get_tensor("step"))


def batch(name: str, step: int, size: int, count: int) -> Tensor:
    """(size,) indices below `count`, a function of the stage's name and the step."""
    return torch.randint(count, (size,), generator=generator(0, f"pretrain/{name}", step))


def _factor(step: int, steps: int) -> float:
    return min(1.0, step / 200, max(0.0, (steps + 1 - step) / math.ceil(steps / 3)))


def _say(stage: Stage, step: int, losses: dict[str, float], pace: float) -> None:
    shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    left = pace * (stage.steps - step) / 60
    print(f"{stage.name} {step:,}/{stage.steps:,}  {shown}  {pace:.2f} s a step, {left:.0f} min left", flush=True)


def _look(stage: Stage, average: dict[str, Tensor], folder: Path, step: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    parameters = dict(stage.module.named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    stage.module.eval()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
        figures = stage.look(folder)
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    stage.module.train()
    print(f"{stage.name} {step:,}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


def _store(
    path: Path,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    buffers: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    tensors = {"step": torch.tensor(step), **{f"buffer/{name}": tensor for name, tensor in buffers.items()}}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach(), f"average/{name}": average[name]}
        tensors |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, partial)
    partial.replace(path)


def _restore(
    path: Path,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    buffers: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    with safe_open(path, framework="pt") as file:
        step = int(file.get_tensor("step"))
        with torch.no_grad():
            for name, tensor in buffers.items():
                tensor.copy_(file.get_tensor(f"buffer/{name}"))
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                average[name].copy_(file.get_tensor(f"average/{name}"))
        names = {parameter: name for name, parameter in parameters.items()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"first/{name}"),
                "exp_avg_sq": file.get_tensor(f"second/{name}"),
            }
            for index, name in enumerate(order)
        }
    # This puts each tensor on the device where the optimiser wants it.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step

"""One network's training: AdamW with an average of the weights, resumable; progress as plain lines, and samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ether_diffusion.files import whole_file
from ether_diffusion.pictures import save_png, sheet
from ether_diffusion.randomness import generator
from ether_diffusion.tinyworld.scenes import SIZE

SAVE_EVERY, LOG_EVERY = 500, 100


@dataclass(frozen=True)
class Stage:
    """What is trained, and for how many steps.

    Attributes:
        module: The network; its parameters are trained, and the statistics in its buffers are saved with them.
        loss: Step -> losses by name, of which `loss` is minimised. Its batch depends on the step alone (see `batch`).
        validate: Writes a picture of samples to a path and returns figures to print; the module has averaged weights.
        decay: Of the running average.
    """

    name: str
    module: nn.Module
    loss: Callable[[int], dict[str, Tensor]]
    validate: Callable[[Path], dict[str, float]]
    steps: int
    learning_rate: float
    decay: float = 0.998
    weight_decay: float = 0.01
    validate_every: int = 1000


class State:
    """Everything that a resumed stage needs: weights, their average, buffers, and AdamW's moments."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = dict(module.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        states = module.state_dict()
        self.buffers = {name: tensor for name, tensor in states.items() if name not in self.parameters}
        for parameter in self.parameters.values():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}

    def save(self, path: Path, step: int) -> None:
        """Write a file, whole or not at all."""
        tensors = {key: tensor.detach().contiguous().clone() for key, tensor in self._tensors().items()}
        with whole_file(path) as partial:
            save_file({"step": torch.tensor(step), **tensors}, partial)

    @torch.no_grad()
    def load(self, path: Path) -> int:
        """Restore the state in place, on the devices of the parameters; returns the step."""
        saved = load_file(path)
        step = int(saved["step"])
        for key, tensor in self._tensors().items():
            tensor.copy_(saved[key])
        for moments in self.optimizer.state.values():
            moments["step"].fill_(step)
        return step

    def _tensors(self) -> dict[str, Tensor]:
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        groups = {
            "buffer": self.buffers,
            "weight": self.parameters,
            "average": self.average,
            "first": {name: of["exp_avg"] for name, of in moments.items()},
            "second": {name: of["exp_avg_sq"] for name, of in moments.items()},
        }
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module has its averaged weights within the block."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.average)
        yield
        self._copy(trained)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def train(stage: Stage, folder: Path, *, start_from: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Train to the end, from the step where an earlier call stopped according to `folder`.

    The learning rate rises over the first 200 steps, stays, and falls linearly to zero over the last third.

    Args:
        start_from: Initial weights, for a stage that was not trained before.

    Returns:
        The averaged state of the module, fp32.
    """
    path = folder / f"{stage.name}.safetensors"
    if start_from is not None:
        stage.module.load_state_dict(start_from)
    parameters = dict(stage.module.named_parameters())
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.99), fused=True)
    state = State(stage.module, optimizer)
    start = state.load(path) if path.exists() else 0
    stage.module.train()
    began = time.monotonic()
    for step in range(start + 1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _factor(step, stage.steps)
        losses = stage.loss(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(stage.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        is_last = step == stage.steps
        if is_last or step % LOG_EVERY == 0:
            pace = (time.monotonic() - began) / (step - start)
            shown = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
            left = f"{pace:.2f} s per step, {pace * (stage.steps - step) / 60:.0f} min left"
            print(f"{stage.name} {step:,}/{stage.steps:,}  {shown}  {left}", flush=True)
        if is_last or step % SAVE_EVERY == 0:
            state.save(path, step)
        if is_last or step % stage.validate_every == 0:
            stage.module.eval()
            with torch.no_grad(), state.averaged():
                figures = stage.validate(folder / "samples" / f"{stage.name}-{step:06d}.png")
            stage.module.train()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{stage.name} {step:,}: {shown}", flush=True)
    return {**state.average, **state.buffers}


def steps_taken(path: Path) -> int:
    """The step of a stage's saved state; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.get_tensor("step"))


def batch(name: str, step: int, size: int, count: int) -> Tensor:
    """(size,) indices below `count`, a function of the stage's name and the step."""
    return torch.randint(count, (size,), generator=generator(0, f"pretrain/{name}", step))


def half(tensor: Tensor) -> torch.autocast:
    """bf16 for the matrix products of a forward pass on this tensor's device; weights and optimiser stay fp32."""
    return torch.autocast(tensor.device.type, torch.bfloat16)


def save_rows(rows: Sequence[Tensor], path: Path) -> None:
    """Save a sheet of rows of images, each (B, 3, 64, 64) in ±1, twice enlarged."""
    pixels = [((row.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    save_png(sheet([("", [Image.fromarray(image) for image in row]) for row in pixels], 2 * SIZE), path)


def _factor(step: int, steps: int) -> float:
    return min(1.0, step / 200, max(0.0, (steps + 1 - step) / math.ceil(steps / 3)))

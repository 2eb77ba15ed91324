"""How much of the disk a run takes that saves whole modules: told before it starts, refused where it does not fit."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.errors import UserError

from .run_folder import RunFolder
from .settings import TrainingSettings

GIB = 2**30
WEIGHT = 4
"""Bytes of a saved weight: fp32."""
STATE = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16}
"""Bytes of an optimiser's state, a weight."""


@dataclass(frozen=True)
class DiskSpace:
    """Bytes that a run's weights and checkpoints take.

    Attributes:
        weights: Of the trained weights, once.
        state: Of what a checkpoint keeps beside them to go on from: the optimiser's state, and, where an average is
            saved, the weights themselves.
        checkpoints: How many are kept, the last ones.
        states: In how many of them the state is kept.
    """

    weights: int
    state: int
    checkpoints: int
    states: int

    @property
    def kept(self) -> int:
        """Bytes when training has ended: the checkpoints, and the run's result."""
        return (self.checkpoints + 1) * self.weights + self.states * self.state

    @property
    def most(self) -> int:
        """Bytes at any time: a checkpoint is complete before an older one goes."""
        return self.kept + self.weights + self.state

    def line(self) -> str:
        """For people."""
        whole = self.weights + self.state
        return (
            f"Disk:    {_size(whole)} a checkpoint, of which the last {self.checkpoints} stay: {_size(self.kept)} in "
            f"the end, {_size(self.most)} at most (training.keep_checkpoints, training.keep_states)"
        )


def disk_space(settings: TrainingSettings, steps: int, trained: int) -> DiskSpace:
    """What a run of so many steps and trained numbers takes."""
    written = math.ceil(steps / settings.checkpoint_every)
    checkpoints = min(written, settings.keep_checkpoints or written)
    averaged = WEIGHT if settings.ema_decay is not None else 0
    state = (STATE[settings.optimizer] + averaged) * trained
    return DiskSpace(WEIGHT * trained, state, checkpoints, min(checkpoints, settings.keep_states))


def check_disk(space: DiskSpace, run: RunFolder) -> None:
    """Refuse a run that would fill the disk hours after its start. What it has written already counts as its own.

    Raises:
        UserError: how much is needed, how much is free, and what to change.
    """
    place = next(folder for folder in (run.path.absolute(), *run.path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in _own(run.path))
    if space.most > free:
        raise UserError(
            f"output_dir: {run.path} needs {_size(space.most)} for checkpoints of whole modules, and {_size(free)} are "
            "free there. Try training.keep_checkpoints=1 with training.keep_states=1, or another output_dir."
        )


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"


def _own(path: Path) -> list[Path]:
    return [file for file in path.rglob("*.safetensors") if file.is_file()] if path.is_dir() else []

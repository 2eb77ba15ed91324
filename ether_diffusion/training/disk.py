"""The disk space of a run that saves whole modules: printed before it starts, refused if there is too little."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from ether_diffusion.errors import UserError

from .config import TrainingSettings
from .run_folder import RunFolder

GIB = 2**30
WEIGHT = 4
"""Bytes per saved weight: fp32."""
STATE = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16}
"""Bytes of an optimiser's state per weight."""


@dataclass(frozen=True)
class DiskSpace:
    """Bytes that a run's weights and checkpoints take."""

    weights: int
    """The trained weights, once."""
    state: int
    """What a checkpoint adds, to resume from: the optimiser's state, and the weights themselves next to an average."""
    checkpoints: int
    """How many checkpoints are kept, the last ones."""
    states: int
    """How many of them keep their state."""

    @property
    def kept(self) -> int:
        """Bytes after training: the checkpoints, and the run's result."""
        return (self.checkpoints + 1) * self.weights + self.states * self.state

    @property
    def most(self) -> int:
        """The most bytes at any time: a checkpoint is complete before an older one is deleted."""
        return self.kept + self.weights + self.state

    def line(self) -> str:
        """The line that a run prints."""
        return (
            f"Disk:    {_size(self.weights + self.state)} per checkpoint; the last {self.checkpoints} are kept: "
            f"{_size(self.kept)} at the end, {_size(self.most)} at most (training.keep_checkpoints, "
            "training.keep_states)"
        )


def disk_space(settings: TrainingSettings, steps: int, trained: int) -> DiskSpace:
    """The space for a run of so many steps that trains so many weights."""
    written = math.ceil(steps / settings.checkpoint_every)
    checkpoints = min(written, settings.keep_checkpoints or written)
    averaged = WEIGHT if settings.ema_decay is not None else 0
    state = (STATE[settings.optimizer] + averaged) * trained
    return DiskSpace(WEIGHT * trained, state, checkpoints, min(checkpoints, settings.keep_states))


def check_disk(space: DiskSpace, run: RunFolder) -> None:
    """Refuse a run that would fill the disk hours after its start. The weights that it has written count as free.

    Raises:
        UserError: how much is needed, how much is free, and what to change.
    """
    place = next(folder for folder in (run.path.absolute(), *run.path.absolute().parents) if folder.exists())
    own = sum(file.stat().st_size for file in run.path.rglob("*.safetensors")) if run.path.is_dir() else 0
    free = shutil.disk_usage(place).free + own
    if space.most > free:
        raise UserError(
            f"output_dir: {run.path} needs {_size(space.most)} for checkpoints of whole modules, and {_size(free)} are "
            "free there. Try training.keep_checkpoints=1 with training.keep_states=1, or another output_dir."
        )


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"

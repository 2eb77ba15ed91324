"""The disk space of a run that saves whole modules: printed before it starts, refused if there is too little."""

from __future__ import annotations

import math
import shutil

from ether_diffusion.errors import UserError

from .config import TrainingSettings
from .run_folder import RunFolder

GIB = 2**30
WEIGHT = 4
"""Bytes per saved weight: fp32."""
STATE = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16}
"""Bytes of an optimiser's state per weight."""


def disk_line(settings: TrainingSettings, steps: int, trained: int, run: RunFolder | None) -> str:
    """The line that a run prints on its checkpoints, once there is space for them.

    Args:
        steps: Of the whole run.
        trained: How many weights are trained.
        run: Where they are saved, whose own weights count as free space; None: nowhere, in a dry run.

    Raises:
        UserError: how much is needed, how much is free, and what to change.
    """
    # A checkpoint is the weights and, to resume from, the optimiser's state; next to an average, the weights again.
    weights = WEIGHT * trained
    state = (STATE[settings.optimizer] + (WEIGHT if settings.ema_decay is not None else 0)) * trained
    written = math.ceil(steps / settings.checkpoint_every)
    checkpoints = min(written, settings.keep_checkpoints or written)
    kept = (checkpoints + 1) * weights + min(checkpoints, settings.keep_states) * state  # with the run's result
    most = kept + weights + state  # a checkpoint is complete before an older one is deleted
    if run is not None:
        place = next(folder for folder in (run.path.absolute(), *run.path.absolute().parents) if folder.exists())
        own = sum(file.stat().st_size for file in run.path.rglob("*.safetensors")) if run.path.is_dir() else 0
        free = shutil.disk_usage(place).free + own
        if most > free:
            raise UserError(
                f"output_dir: {run.path} needs {_size(most)} for checkpoints of whole modules, and {_size(free)} are "
                "free there. Try training.keep_checkpoints=1 with training.keep_states=1, or another output_dir."
            )
    return (
        f"Disk:    {_size(weights + state)} per checkpoint; the last {checkpoints} are kept: {_size(kept)} at the end, "
        f"{_size(most)} at most (training.keep_checkpoints, training.keep_states)"
    )


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"

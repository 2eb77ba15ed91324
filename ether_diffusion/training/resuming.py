"""Whether a run goes on from a checkpoint, whether it is still the same run, and what becomes of later checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError

from .checkpoint import Checkpoint, flatten, list_checkpoints

SET_ASIDE = "set_aside"
PRECISION = "training.mixed_precision"

# A resumed run may differ from the interrupted one in these; in anything else it would be another run.
_FREE_TO_CHANGE = (
    "output_dir",
    "allow_pickle",
    "training.resume",
    # The same samples a step, which are compared by themselves, may be shared out among other processes.
    "training.batch_size",
    "training.gradient_accumulation",
    "training.checkpoint_every",
    "training.keep_states",
    "training.keep_checkpoints",
    "training.workers",
    "training.tracker",
    "validation.",
)


def resumes(root: Path, resume: bool | str) -> bool:
    """Whether a run with these checkpoints starts from one of them, or not at all: `find_checkpoint` gives no None."""
    named = isinstance(resume, str) and resume != "latest"
    return named or (bool(resume) and bool(list_checkpoints(root)))


def check_resumable(
    checkpoint: Checkpoint, config: Settings, samples_per_step: int, precision: str, may_grow: bool
) -> None:
    """Refuse to go on with what would make another run of it.

    Args:
        precision: What the processes run in, as accelerate names it: the setting may leave it to the launcher.
        may_grow: The number of steps may change, because no schedule depends on it.

    Raises:
        UserError: names everything that changed, with both values.
    """
    before, after = flatten(checkpoint.trainer["settings"]), flatten(config.model_dump(mode="json"))
    free = (*_FREE_TO_CHANGE, "training.steps", "training.epochs") if may_grow else _FREE_TO_CHANGE
    if "mixed_precision" in checkpoint.trainer:  # the precision itself, whoever asked for it
        before[PRECISION], after[PRECISION] = checkpoint.trainer["mixed_precision"], precision
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    faults = [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed if not key.startswith(free)]
    if not faults and samples_per_step != checkpoint.trainer["samples_per_step"]:
        faults.append(f"samples a step were {checkpoint.trainer['samples_per_step']}, are {samples_per_step}")
    if faults:
        raise UserError(f"training.resume: {checkpoint.folder} was trained with other settings: {'; '.join(faults)}.")


def set_aside_after(root: Path, step: int) -> list[str]:
    """Move the checkpoints after `step`, whose steps a resumed run takes again, into `set_aside/`. Gives their names.

    Damaged ones would otherwise count among the last, for whose sake those that can be resumed from are dropped.
    """
    later = [folder for folder in list_checkpoints(root) if int(folder.name.removeprefix("step-")) > step]
    for folder in later:
        place = root / SET_ASIDE / folder.name
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        folder.replace(place)
    return [folder.name for folder in later]

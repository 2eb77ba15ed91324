"""Whether a run resumes from a checkpoint, whether its settings allow that, and what becomes of later checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ether_diffusion.errors import UserError
from ether_diffusion.files import list_checkpoints, step_of

from .checkpoint import Checkpoint, find_checkpoint, flatten
from .config import TaskConfig
from .schedule import Plan

SET_ASIDE = "set_aside"
PRECISION = "training.mixed_precision"

# A resumed run may have other values of these settings; any other setting would change its numbers.
_FREE_TO_CHANGE = (
    "output_dir",
    "allow_pickle",
    "push_to_hub",
    "hub_private",
    "training.resume",
    # Class images and encoded images are looked up by content.
    "data.cache_dir",
    "data.prior.cache_dir",
    # The samples per step are compared by themselves; other processes may share them.
    "training.batch_size",
    "training.gradient_accumulation",
    "training.checkpoint_every",
    "training.keep_states",
    "training.keep_checkpoints",
    "training.require_certificate",
    "training.workers",
    "training.log_every",
    "training.profile",
    "training.allow_cpu",
    "training.tracker",
    "validation.",
)

_BEFORE_THERE_WAS = {"training.compile": False, "adapter.init_lora_weights": "kaiming"}
"""What runs of earlier versions did, whose checkpoints do not record these settings."""

_PATHS = ("instance_dir", "dataset_dir", "masks", "captions", "class_dir", "init_from", "after", "base_model", "vae")
"""Settings that name a file or folder, where the same one may be spelled in other ways."""


def resumes(root: Path, resume: bool | str) -> bool:
    """Whether a run with these checkpoints starts from one of them: `find_checkpoint` returns one or raises."""
    named = isinstance(resume, str) and resume != "latest"
    return named or (bool(resume) and bool(list_checkpoints(root)))


def checkpoint_to_resume(
    config: TaskConfig, root: Path, plan: Plan, accelerator: Accelerator, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """The checkpoint that a run resumes from, once it fits the run; None: the run starts at step 0.

    Args:
        root: The folder of the run's checkpoints.
        inputs: As `Task.inputs`.

    Raises:
        UserError: as `find_checkpoint`; or settings differ that would change the run's numbers, all of which are named
            with both values; or the checkpoint has taken more steps than the plan has.
    """
    training = config.training
    checkpoint = find_checkpoint(root, training.resume, accelerator.print) if training.resume else None
    if checkpoint is None:
        return None
    trained = checkpoint.trainer
    after = flatten(_with_resolved_paths(config.model_dump(mode="json")))
    unrecorded = {key: value for key, value in _BEFORE_THERE_WAS.items() if key in after}
    before = {**unrecorded, **flatten(_with_resolved_paths(trained["settings"]))}
    if "mixed_precision" in trained:  # the precision itself, whether config or launcher asked for it
        before[PRECISION], after[PRECISION] = trained["mixed_precision"], accelerator.mixed_precision
    # Where no schedule depends on it, the number of steps may change.
    steps = ("training.steps", "training.epochs") if training.schedule == "constant" else ()
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    # Data is the same where its content is, wherever it lies.
    recorded = trained.get("inputs", {})  # earlier versions recorded none
    free = (*_FREE_TO_CHANGE, *steps, *(key for key, digest in inputs.items() if recorded.get(key) == digest))
    faults = [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed if not key.startswith(free)]
    other = [key for key, digest in sorted(recorded.items()) if inputs.get(key) not in (None, digest)]
    faults += [f"{key} holds other files than it did" for key in other]
    if not faults and plan.samples_per_step != trained["samples_per_step"]:
        faults.append(f"samples a step were {trained['samples_per_step']}, are {plan.samples_per_step}")
    if faults:
        raise UserError(f"training.resume: {checkpoint.folder} was trained with other settings: {'; '.join(faults)}.")
    if checkpoint.step > plan.steps:
        raise UserError(
            f"training.steps: {plan.steps}, but {checkpoint.folder} has taken {checkpoint.step} steps already."
        )
    return checkpoint


def _with_resolved_paths(settings: Any, name: str = "") -> Any:
    if isinstance(settings, dict):
        return {key: _with_resolved_paths(value, key) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_with_resolved_paths(value, name) for value in settings]
    if name in _PATHS and isinstance(settings, str) and Path(settings).expanduser().exists():
        return str(Path(settings).expanduser().resolve())
    return settings


def set_aside_after(root: Path, step: int) -> list[str]:
    """Move the checkpoints after `step`, whose steps a resumed run takes again, into `set_aside/`. Returns their names.

    Otherwise damaged ones would count among the last, and those that can be resumed from would be dropped for them.
    """
    later = [folder for folder in list_checkpoints(root) if (step_of(folder) or 0) > step]
    for folder in later:
        place = root / SET_ASIDE / folder.name
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        folder.replace(place)
    return [folder.name for folder in later]

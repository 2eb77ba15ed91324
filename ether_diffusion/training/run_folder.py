"""A run's folder: what it may hold before a run starts, the disk space it needs, the files that grow in training."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from accelerate import Accelerator

from ether_diffusion.config import to_yaml
from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, check_free, list_checkpoints, make_folder, write_whole

from .checkpoint import flatten
from .claim import LOCK, claimed
from .config import TaskConfig, TrainingSettings
from .environment import is_first_process
from .resuming import SET_ASIDE, set_aside_after

GIB = 2**30
WEIGHT = 4
"""Bytes per saved weight: fp32."""
STATE = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16}
"""Bytes of an optimiser's state per weight."""


class RunFolder:
    """`config.yaml`, `checkpoints/`, `samples/`, `metrics.jsonl` and `logs/` of one training run, and its result:
    `adapter/` and `condition_encoder/`, or a whole `unet/` or `controlnet/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.adapter = path / "adapter"
        self.samples = path / "samples"
        self.logs = path / "logs"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"

    @contextlib.contextmanager
    def claimed(self, resume: bool | str) -> Iterator[None]:
        """Within the block the folder is this run's alone: of all its processes, the first holds the lock.

        Raises:
            UserError: as `check_free`; or another training uses the folder.
        """
        self.check_free(resume)  # before anything is written to a folder that is not ours
        with claimed(self.path) if is_first_process() else contextlib.nullcontext():
            self.check_free(resume)
            yield

    def check_free(self, resume: bool | str) -> None:
        """Refuse a folder that the run would overwrite. Writes nothing.

        A run that resumes may start at step 0 if there is no checkpoint yet; not if there was one, or a result.

        Args:
            resume: The setting `training.resume`.

        Raises:
            UserError: the path is a file; or a folder that is not empty, and the run does not resume; or the run
                resumes from its last checkpoint, and its checkpoints are gone.
        """
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} == {LOCK}:
            return
        if not resume or not self.path.is_dir():
            remedy = "Resume that run with training.resume=true, or choose another output_dir."
            check_free(self.path, "output_dir", remedy)
        elif resume in (True, "latest") and not list_checkpoints(self.checkpoints) and (lost := self._lost()):
            raise UserError(
                f"training.resume: {lost}, but {self.checkpoints} has no checkpoint; training would start again at "
                "step 0 and overwrite it. Put the checkpoints back, or choose another output_dir."
            )

    @contextlib.contextmanager
    def open(self, config: TaskConfig, accelerator: Accelerator, start: int) -> Iterator[None]:
        """Prepare the folder for the steps after `start`, and keep the tracker open within the block.

        Metrics and checkpoints of later steps, which a resumed run takes again, are dropped and set aside.
        """
        if accelerator.is_main_process:
            write_whole(self.config, to_yaml(config))
            make_folder(self.checkpoints)
            if self.metrics.exists():
                write_whole(self.metrics, "".join(line for step, line in self._logged() if step <= start))
            later = set_aside_after(self.checkpoints, start)
            if later:
                folder = self.checkpoints / SET_ASIDE
                accelerator.print(f"Set aside: {', '.join(later)}, after step {start}, into {folder}.")
        accelerator.wait_for_everyone()
        tracked = config.training.tracker != "none"
        if tracked:
            flat = flatten(config.model_dump(mode="json"))
            simple = {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in flat.items()}
            accelerator.init_trackers("ether_diffusion", simple)
        try:
            yield
        finally:
            if tracked:
                accelerator.end_training()

    def log(self, accelerator: Accelerator, step: int, values: dict[str, float], seconds: float) -> None:
        """Send the numbers of a step that took so long to the tracker, and append them to metrics.jsonl."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        accelerator.log(finite, step=step)
        if accelerator.is_main_process:
            # JSON has no infinity: the norm of an overflowed fp16 step is null
            row = {"step": step, **{name: finite.get(name) for name in values}, "seconds": round(seconds, 4)}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _lost(self) -> str | None:
        """What a run without checkpoints would overwrite by starting again; None: nothing but its first steps."""
        weights = [path.relative_to(self.path) for path in self.path.rglob("*.safetensors")]
        results = sorted({path.parts[0] for path in weights if path.parts[0] != CHECKPOINTS})
        if results:
            return f"{self.path / results[0]} holds trained weights"
        last = max((step for step, _ in self._logged()), default=0)
        return f"{self.metrics} has {last:,} steps" if last and not self._precedes_first_checkpoint(last) else None

    def _precedes_first_checkpoint(self, step: int) -> bool:
        """Whether a run that stopped after `step`, as in a crash, had no checkpoint yet."""
        try:
            training = yaml.safe_load(self.config.read_text(encoding="utf-8"))["training"]
            first = min(training["checkpoint_every"], training["steps"] or math.inf)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return False
        # A step is logged before its checkpoint is written; the folder is there from the start.
        return step < first or (step == first and self.checkpoints.is_dir())

    def _logged(self) -> list[tuple[int, str]]:
        """The steps in metrics.jsonl, each with its line; lines that a crash cut short are left out."""
        logged = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                logged.append((int(json.loads(line)["step"]), f"{line}\n"))
        return logged


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

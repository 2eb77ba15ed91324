"""A benchmark made concrete: protocols, units, and the training config of each; checked before any of them starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ether_diffusion.config import load_config
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.map_scores import find_scenes
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.evaluation.subject_images import BUILTIN
from ether_diffusion.evaluation.subject_list import FILE, check_subject_list, read_subject_list
from ether_diffusion.training import controllable, dreambooth
from ether_diffusion.training.config import TaskConfig
from ether_diffusion.training.settings import TrainingSettings

from .config import BenchmarkConfig, MapPart, Part, SubjectPart, Unit

# Of all trainings, unless their settings say otherwise: what takes time and leaves no trace in the numbers.
QUIET = {
    dreambooth.TASK: ("training.tracker=none", "validation.prompts=[]"),
    controllable.TASK: ("training.tracker=none", "validation.images=0"),
}


@dataclass(frozen=True)
class Plan:
    """What a config comes to."""

    config: BenchmarkConfig

    @cached_property
    def subjects(self) -> tuple[SubjectPart, SubjectProtocol] | None:
        part = self.config.dreambooth
        return (part, load_protocol(SubjectProtocol, part.protocol)) if part else None

    @cached_property
    def maps(self) -> tuple[MapPart, MapProtocol] | None:
        part = self.config.controllable
        return (part, load_protocol(MapProtocol, part.protocol)) if part else None

    @cached_property
    def scenes(self) -> Pairs:
        """The pairs that maps are scored on."""
        assert self.maps is not None
        part, protocol = self.maps
        return find_scenes(protocol, part.dataset_dir, part.captions, part.caption_template)

    def part(self, task: str) -> tuple[Part, SubjectProtocol | MapProtocol]:
        """Of a task that the benchmark has."""
        found = self.subjects if task == dreambooth.TASK else self.maps
        assert found is not None
        return found

    @property
    def tasks(self) -> list[str]:
        return [task for task, found in ((dreambooth.TASK, self.subjects), (controllable.TASK, self.maps)) if found]

    def names(self) -> tuple[str, ...]:
        """The subjects. Raises UserError for one that the protocol does not have."""
        if self.subjects is None:
            return ()
        part, protocol = self.subjects
        names = tuple(protocol.subjects) if part.subjects is None else part.subjects
        for name in names:
            protocol.entry(name, "dreambooth.subjects")
        if not names or len(set(names)) < len(names):
            raise UserError(f"dreambooth.subjects: {', '.join(names) or '(none)'}; expected some, each once.")
        return names

    def units(self) -> list[Unit]:
        """In order: all methods of a subject, then of the next."""
        units = []
        if self.subjects is not None:
            units += [
                Unit(dreambooth.TASK, method, name) for name in self.names() for method in self.subjects[0].methods
            ]
        if self.maps is not None:
            units += [Unit(controllable.TASK, method) for method in self.maps[0].methods]
        return units

    def readings(self, unit: Unit) -> list[Unit]:
        """What is drawn and scored of a unit's training: what the table is made of, and further checkpoints."""
        return [unit, *(replace(unit, step=step) for step in self.part(unit.task)[0].also_checkpoints)]

    def folder(self, task: str, method: str, step: int | None = None) -> Path:
        """Of a method; or of what was drawn and scored of its trainings' checkpoints of one step."""
        folder = self.config.output_dir / task / method
        return folder if step is None else folder / "steps" / f"step-{step:06d}"

    def run_folder(self, unit: Unit) -> Path:
        """Of the unit's training."""
        folder = self.folder(unit.task, unit.method)
        return folder / "runs" / unit.subject if unit.subject else folder / "run"

    def photos_folder(self, subject: str) -> str:
        assert self.subjects is not None
        root = self.subjects[0].dataset_dir
        return f"{BUILTIN}{subject}" if root == BUILTIN else str(Path(root) / subject)

    def training(self, unit: Unit) -> Any:
        """The resolved config of the unit's training. Raises ConfigError."""
        part, protocol = self.part(unit.task)
        method = part.methods[unit.method]
        fixed: dict[str, Any] = {"output_dir": str(self.run_folder(unit)), "training.resume": True}
        if isinstance(protocol, SubjectProtocol):
            assert unit.subject is not None
            fixed |= {
                "data.instance_dir": self.photos_folder(unit.subject),
                "data.class_name": protocol.subjects[unit.subject].class_name,
                "data.identifier": protocol.identifier,
            }
        else:
            fixed |= {"data.dataset_dir": part.dataset_dir}
        model: type[TaskConfig]
        model, resolve = (
            (dreambooth.DreamBoothConfig, dreambooth.resolve)
            if unit.task == dreambooth.TASK
            else (controllable.ControllableConfig, controllable.resolve)
        )
        overrides = [
            *QUIET[unit.task],
            *part.settings,
            *method.settings,
            *(f"{k}={json.dumps(v)}" for k, v in fixed.items()),
        ]
        config: Any = load_config(model, method.config, overrides)
        prior = getattr(config.data, "prior", None)
        if prior is not None and prior.class_dir is None and prior.cache_dir is None:
            prior = prior.model_copy(update={"cache_dir": self.config.output_dir / "class_images"})
            config = config.model_copy(update={"data": config.data.model_copy(update={"prior": prior})})
        return resolve(config)

    def check(self) -> None:
        """Find what would stop a worker hours later: configs, protocols, photos, scenes, judges.

        Raises:
            UserError: the first fault.
        """
        for unit in self.units():
            self._check_training(unit)
        self._check_photos()
        if self.subjects is not None and (listed := Path(self.subjects[0].dataset_dir) / FILE).is_file():
            check_subject_list(self.subjects[1], read_subject_list(listed))
        if self.maps is not None:
            _ = self.scenes
        for task in self.tasks:
            part, protocol = self.part(task)
            load_scorers(protocol.judges, part.judges)

    def _check_photos(self) -> None:
        if self.subjects is None:
            return
        names, root = self.names(), self.subjects[0].dataset_dir
        missing = [name for name in names if root != BUILTIN and not Path(root, name).is_dir()]
        if missing:
            there = ", ".join(name for name in names if name not in missing)
            raise UserError(
                f"dreambooth.dataset_dir: {root} has no folder of {len(missing)} of the {len(names)} subjects: "
                f"{', '.join(missing)}." + (f" Of the others alone: dreambooth.subjects=[{there}]" if there else "")
            )
        for name in names:
            find_photos(self.photos_folder(name))

    def _check_training(self, unit: Unit) -> None:
        part, protocol = self.part(unit.task)
        training = self.training(unit)
        where = f"{unit.task}.methods.{unit.method}"
        if protocol.base_model not in (None, training.base_model):
            known = f"the judges of {protocol.name} know base {protocol.base_model!r} alone"
            raise UserError(f"{where}: base_model {training.base_model!r}; {known}.")
        if training.data.resolution != protocol.resolution:
            sides = f"data.resolution {training.data.resolution}; {protocol.name} draws {protocol.resolution}"
            raise UserError(f"{where}: {sides}.")
        if getattr(training.data, "more_subjects", ()):
            raise UserError(f"{where}: data.more_subjects; a benchmark trains each subject alone.")
        settings = training.training
        asked = [("checkpoint", part.checkpoint), *(("also_checkpoints", step) for step in part.also_checkpoints)]
        for key, step in asked:
            if step is not None and (
                (settings.steps is not None and step > settings.steps)
                or (step % settings.checkpoint_every and step != settings.steps)
            ):
                raise UserError(
                    f"{unit.task}.{key}: {step}; {where} has one every {settings.checkpoint_every} steps, up to "
                    f"{settings.steps or 'its last'}."
                )
            if step is not None and step != settings.steps and not _is_kept(settings, step):
                raise UserError(
                    f"{unit.task}.{key}: {step}; {where} keeps the last {settings.keep_checkpoints} checkpoints alone "
                    "(training.keep_checkpoints)."
                )


def _is_kept(settings: TrainingSettings, step: int) -> bool:
    """Whether the checkpoint of this step is there when training has ended, as far as can be told before it."""
    if settings.keep_checkpoints is None or settings.steps is None:
        return True
    written = math.ceil(settings.steps / settings.checkpoint_every)
    return step > (written - settings.keep_checkpoints) * settings.checkpoint_every

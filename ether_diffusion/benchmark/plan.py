"""A benchmark's plan: protocols, units, the training config and the files of each; checked before any unit starts."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ether_diffusion.config import load_config
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.map_images import find_scenes
from ether_diffusion.evaluation.map_scores import check_segmenters
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.evaluation.subject_images import BUILTIN
from ether_diffusion.evaluation.subject_list import FILE as SUBJECT_LIST
from ether_diffusion.evaluation.subject_list import check_subject_list, read_subject_list
from ether_diffusion.files import CHECKPOINTS, checkpoint_name
from ether_diffusion.models.bases import Base
from ether_diffusion.training import controllable, dreambooth
from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.many_runs import shared_settings, why_alone
from ether_diffusion.training.task import TrainingTask
from ether_diffusion.training.training_base import load_base_of, try_adapter

from .config import BenchmarkConfig, MapPart, Pack, Part, SubjectPart, Unit
from .stages import TRAINED, Stages

TRAININGS: dict[str, tuple[TrainingTask[Any], tuple[str, ...]]] = {
    dreambooth.NAME: (dreambooth.TASK, ("training.tracker=none", "validation.prompts=[]")),
    controllable.NAME: (controllable.TASK, ("training.tracker=none", "validation.images=0")),
}
"""By name: a task, and settings that save time without a change of the weights. The part's and the method's settings
override them."""
TOGETHER = 8
"""Trainings that share passes by default: more save little further time, and take memory."""


@dataclass(frozen=True)
class Plan:
    """A config with its protocols loaded."""

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
        found = self.subjects if task == dreambooth.NAME else self.maps
        assert found is not None
        return found

    @property
    def tasks(self) -> list[str]:
        return [task for task, found in ((dreambooth.NAME, self.subjects), (controllable.NAME, self.maps)) if found]

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
        """In order: all methods of a subject, then of the next; then maps."""
        subject_methods = self.subjects[0].methods if self.subjects else ()
        units = [Unit(dreambooth.NAME, method, name) for name in self.names() for method in subject_methods]
        return units + [Unit(controllable.NAME, method) for method in (self.maps[0].methods if self.maps else ())]

    @cached_property
    def packs(self) -> list[Pack]:
        """The units that train in shared passes. The config alone decides that, and so how their numbers are rounded:
        not the workers, nor what is trained already."""
        most = {"auto": TOGETHER, "off": 1}.get(str(self.config.pack), self.config.pack)
        assert isinstance(most, int)
        alike: dict[str, list[Unit]] = {}
        for unit in self.units() if most > 1 else ():
            training = self.training(unit)
            if TRAININGS[unit.task][0].run_many is not None and why_alone(training) is None:
                alike.setdefault(json.dumps(shared_settings(training), sort_keys=True), []).append(unit)
        return [pack for units in alike.values() for pack in _shares(units, most) if len(pack) > 1]

    def untrained_packs(self, units: Collection[Unit]) -> list[Pack]:
        """The packs among these units that are not trained yet. Raises UserError as `stages`."""
        return [
            pack
            for pack in self.packs
            if all(unit in units for unit in pack)
            and sum(self.stages(unit).outputs(TRAINED) is None for unit in pack) > 1
        ]

    def readings(self, unit: Unit) -> list[Unit]:
        """The unit itself, and one for each further checkpoint of its training that is scored."""
        return [unit, *(replace(unit, step=step) for step in self.part(unit.task)[0].also_checkpoints)]

    def folder(self, task: str, method: str, step: int | None = None) -> Path:
        """Of a method; or of the images and scores of its trainings' checkpoints of one step."""
        folder = self.config.output_dir / task / method
        return folder if step is None else folder / "steps" / checkpoint_name(step)

    def run_folder(self, unit: Unit) -> Path:
        """Of the unit's training."""
        folder = self.folder(unit.task, unit.method)
        return folder / "runs" / unit.subject if unit.subject else folder / "run"

    def source(self, unit: Unit) -> Path:
        """What the unit's images are generated from: the run, or one of its checkpoints."""
        folder, step = self.run_folder(unit), unit.step or self.part(unit.task)[0].checkpoint
        return folder if step is None else folder / CHECKPOINTS / checkpoint_name(step)

    def images_folder(self, unit: Unit) -> Path:
        """Where `images.jsonl` of the unit's images lies."""
        folder = self.folder(unit.task, unit.method, unit.step)
        return folder / "images" / unit.subject if unit.subject else folder

    def scores_file(self, unit: Unit) -> Path:
        """The scores of a subject, or the results of a method that has no subjects."""
        folder = self.folder(unit.task, unit.method, unit.step)
        return folder / "scores" / f"{unit.subject}.json" if unit.subject else folder / RESULTS

    def stages(self, unit: Unit) -> Stages:
        """The stages of a unit as they are on the disk. Raises UserError if they cannot be read."""
        folder = self.folder(unit.task, unit.method, unit.step)
        return Stages(folder / "stages" / f"{unit.subject}.json" if unit.subject else folder / "stages.json")

    def photos_folder(self, subject: str) -> str:
        assert self.subjects is not None
        root = self.subjects[0].dataset_dir
        return f"{BUILTIN}{subject}" if root == BUILTIN else str(Path(root) / subject)

    def training(self, unit: Unit) -> Any:
        """The resolved config of the unit's training. Raises UserError, also for a setting that is fixed here."""
        if unit not in self._trainings:
            self._trainings[unit] = self._training(unit)
        return self._trainings[unit]

    @cached_property
    def _trainings(self) -> dict[Unit, Any]:
        return {}

    def _training(self, unit: Unit) -> Any:
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
        for setting in (*part.settings, *method.settings):
            if setting.partition("=")[0] in fixed:
                raise UserError(
                    f"{unit.task}.methods.{unit.method}: settings: {setting}: a benchmark sets that itself."
                )
        task, defaults = TRAININGS[unit.task]
        overrides = [*defaults, *part.settings, *method.settings, *(f"{k}={json.dumps(v)}" for k, v in fixed.items())]
        config: Any = load_config(task.config, method.config, overrides)
        prior = getattr(config.data, "prior", None)
        if prior is not None and prior.class_dir is None and prior.cache_dir is None:
            prior = prior.model_copy(update={"cache_dir": self.config.output_dir / "class_images"})
            config = config.model_copy(update={"data": config.data.model_copy(update={"prior": prior})})
        return task.resolve(config)

    def check(self) -> None:
        """Find what would stop a worker hours later: faults of configs, protocols, photos, scenes and scorers.

        Raises:
            UserError: the first fault.
        """
        for unit in self.units():
            self._check_training(unit)
        self._check_photos()
        if self.subjects is not None and (listed := Path(self.subjects[0].dataset_dir) / SUBJECT_LIST).is_file():
            check_subject_list(self.subjects[1], read_subject_list(listed))
        for task in self.tasks:
            part, protocol = self.part(task)
            scorers = load_scorers(protocol.judges, part.judges)
            if isinstance(protocol, MapProtocol):
                check_segmenters(protocol, scorers)
        self._try_adapters()
        if self.maps is not None:
            _ = self.scenes

    def _try_adapters(self) -> None:
        """Attach what is still to be trained to meta copies of the bases: a target may match nothing."""
        tried: set[str] = set()
        bases: dict[str, Base] = {}
        for unit in self.units():
            if self.stages(unit).outputs(TRAINED) is not None:
                continue
            training = self.training(unit)
            name = training.model_dump_json(include={"base_model", "revision", "vae"})
            if (adapter := name + training.adapter.model_dump_json()) not in tried:
                tried.add(adapter)
                if name not in bases:
                    bases = {name: load_base_of(training)}  # one at a time
                try:
                    try_adapter(training, bases[name], None)
                except UserError as error:
                    raise UserError(f"{unit.task}.methods.{unit.method}: {error}") from None

    def _check_photos(self) -> None:
        if self.subjects is None:
            return
        names, root = self.names(), self.subjects[0].dataset_dir
        missing = [name for name in names if root != BUILTIN and not Path(root, name).is_dir()]
        if missing:
            there = ", ".join(name for name in names if name not in missing)
            raise UserError(
                f"dreambooth.dataset_dir: {root} has no folder for {len(missing)} of the {len(names)} subjects: "
                f"{', '.join(missing)}." + (f" For only the others: dreambooth.subjects=[{there}]" if there else "")
            )
        for name in names:
            find_photos(self.photos_folder(name))

    def _check_training(self, unit: Unit) -> None:
        part, protocol = self.part(unit.task)
        training = self.training(unit)
        where = f"{unit.task}.methods.{unit.method}"
        if protocol.base_model not in (None, training.base_model):
            known = f"the scorers of {protocol.name} know only base {protocol.base_model!r}"
            raise UserError(f"{where}: base_model {training.base_model!r}; {known}.")
        if training.data.resolution != protocol.resolution:
            sides = f"data.resolution {training.data.resolution}; {protocol.name} has {protocol.resolution}"
            raise UserError(f"{where}: {sides}.")
        if getattr(training.data, "more_subjects", ()):
            raise UserError(f"{where}: data.more_subjects; a benchmark trains each subject alone.")
        asked = [("checkpoint", part.checkpoint), *(("also_checkpoints", step) for step in part.also_checkpoints)]
        for key, step in asked:
            if step is not None and (fault := _checkpoint_fault(training.training, step)):
                raise UserError(f"{unit.task}.{key}: {step}; {where} {fault}.")


def _shares(units: Sequence[Unit], most: int) -> list[Pack]:
    """The units in as few shares of at most so many as can be, of equal sizes, give or take one."""
    count = math.ceil(len(units) / most)
    return [tuple(units[len(units) * k // count : len(units) * (k + 1) // count]) for k in range(count)]


def sampling_settings(protocol: SubjectProtocol | MapProtocol) -> dict[str, Any]:
    """The settings of a protocol that images depend on."""
    return protocol.model_dump(mode="json", include={"resolution", "seed", "images_per_prompt", "sampling"})


def _checkpoint_fault(settings: TrainingSettings, step: int) -> str | None:
    """Why the checkpoint of a step will be missing when a training ends, as far as its settings show it."""
    steps, every, keep = settings.steps, settings.checkpoint_every, settings.keep_checkpoints
    if step == steps:
        return None
    if step % every or (steps is not None and step > steps):
        return f"has one every {every} steps, up to {steps or 'its last'}"
    if steps is not None and keep is not None and step <= (math.ceil(steps / every) - keep) * every:
        return f"keeps only the last {keep} checkpoints (training.keep_checkpoints)"
    return None

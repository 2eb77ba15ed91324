"""A worker of a benchmark: trains, generates and scores a unit, and resumes where another worker stopped."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.galleries import GalleryFeatures, gallery_digest
from ether_diffusion.evaluation.image_records import LIST
from ether_diffusion.evaluation.map_images import MapImages, find_map_images, generate_map_images
from ether_diffusion.evaluation.map_scores import score_maps
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.evaluation.subject_images import (
    AFTER,
    BEFORE,
    DRIFT,
    SubjectImages,
    find_run,
    generate_run,
    photos_of,
    read_subject,
    with_gallery,
)
from ether_diffusion.evaluation.subject_scores import score_subject
from ether_diffusion.files import Digest, digest_of_json
from ether_diffusion.generation import SavedRun, Source, jobs_for, pair_sources, pick_device, read_run
from ether_diffusion.models.module_files import module_digest
from ether_diffusion.training.checkpoint import flatten
from ether_diffusion.training.class_images import ClassImages, class_images
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.environment import OutOfMemory
from ether_diffusion.training.loop import Diverged
from ether_diffusion.training.many_runs import RunsFailed
from ether_diffusion.training.task import Report
from ether_diffusion.training.training_base import load_training_base

from .config import BenchmarkConfig, Pack, Unit
from .inputs import BenchmarkData
from .plan import TRAININGS, Plan, sampling_settings
from .score_files import save_scores
from .stages import DIVERGED, DRAWN, SCORED, TRAINED, drop_incomplete_batches, locked

# Settings of a training that its weights do not depend on, or whose data is recorded by content.
IGNORED_SETTINGS = (
    "output_dir", "allow_pickle", "training.resume", "training.tracker", "training.workers", "training.keep_states",
    "training.keep_checkpoints", "training.checkpoint_every", "training.require_certificate", "validation.",
    "data.instance_dir", "data.dataset_dir", "data.cache_dir", "data.prior.cache_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run or one of its checkpoints, read once, and the digests of its weights."""

    run: SavedRun
    digests: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Trained:
        """Raises UserError as `read_run`."""
        run = read_run(path)
        digests = {"adapter": run.adapter.weights_digest} if run.adapter is not None else {}
        if run.condition_encoder is not None:
            digests["condition_encoder"] = module_digest(run.condition_encoder)
        return cls(run, digests)


class Worker:
    """Does units. What does not depend on the unit, such as scorers, is loaded once."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config, self.plan = config, Plan(config)
        self.data = BenchmarkData(config.output_dir)
        self._scorers: dict[str, dict[str, Loaded]] = {}
        self._most = sys.maxsize
        """Trainings that fit into memory at once, as far as is known."""
        self._gallery_features: GalleryFeatures = {}
        if config.threads is not None:
            # The trainer takes all cores unless this variable sets a number.
            os.environ["OMP_NUM_THREADS"] = str(config.threads)
            torch.set_num_threads(config.threads)

    def do(self, unit: Unit) -> None:
        """Train, generate and score, as far as that is not done.

        Raises:
            UserError: the folder holds something made with other settings; or as the stages raise.
            TrainingFailed: the training cannot continue.
            Interrupted: a signal came in the training; a checkpoint was written.
        """
        # Of two workers with the same unit, the second finds it done.
        with self._lock(unit):
            trained = self._train(unit)
            for reading in self.plan.readings(unit):
                source = self.plan.source(reading)
                found = self._generate(reading, trained if source == trained.run.path else Trained.read(source))
                self._score(reading, found)

    def train_together(self, pack: Pack) -> None:
        """Train units in shared passes, as far as that is not done. One that fails is left to `do`.

        Raises:
            UserError: as `do`.
            Interrupted: a signal came; every training has a checkpoint.
        """
        with contextlib.ExitStack() as locks:
            for unit in sorted(pack, key=str):  # in one order, so that no two workers wait for each other
                locks.enter_context(self._lock(unit))
            stages = {unit: self.plan.stages(unit) for unit in pack}
            waiting = [unit for unit in pack if stages[unit].begin(TRAINED, self._inputs(unit)) is None]
            outcomes: Sequence[Any] = ()
            while not outcomes and min(self._most, len(waiting)) > 1:
                outcomes = self._outcomes(waiting)
            for unit, outcome in zip(waiting, outcomes, strict=False):
                if isinstance(outcome, Diverged):
                    stages[unit].end(TRAINED, {DIVERGED: str(outcome)})
                elif isinstance(outcome, Report):
                    stages[unit].end(TRAINED, Trained.read(self.plan.run_folder(unit)).digests)

    def _outcomes(self, units: Sequence[Unit]) -> Sequence[Any]:
        """Reports or errors of trainings in shared passes; none, if fewer at once have to be tried."""
        trainings = [self.plan.training(unit) for unit in units]
        print(f"{units[0]} and {len(units) - 1} more: training together", flush=True)
        self._prepare(trainings)
        run_many = TRAININGS[units[0].task][0].run_many
        assert run_many is not None
        try:
            return run_many(trainings, max_together=min(self._most, len(units)))
        except RunsFailed as failed:
            return failed.outcomes
        except OutOfMemory:
            self._most = min(self._most, len(units)) // 2
            print(f"Out of memory. Next: {self._most} at once.", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ()

    def _inputs(self, unit: Unit) -> dict[str, Any]:
        """What a unit's weights depend on."""
        training = self.plan.training(unit)
        settings = flatten(training.model_dump(mode="json"))
        inputs: dict[str, Any] = {key: v for key, v in settings.items() if not key.startswith(IGNORED_SETTINGS)}
        if unit.subject is None:
            return inputs | self.data.of_pairs(training)
        return inputs | self.data.of_subject(training, find_photos(self.plan.photos_folder(unit.subject)).photos)

    def _train(self, unit: Unit) -> Trained:
        training, folder, stages = self.plan.training(unit), self.plan.run_folder(unit), self.plan.stages(unit)
        before = stages.begin(TRAINED, self._inputs(unit))
        if before is not None and DIVERGED in before:
            raise Diverged(before[DIVERGED])
        if before is not None:
            with contextlib.suppress(UserError):  # nothing there, or damaged: trained again
                trained = Trained.read(folder)
                if trained.digests == before:
                    return trained
        print(f"{unit}: training", flush=True)
        self._prepare([training])
        try:
            TRAININGS[unit.task][0].run(training)
        except Diverged as error:
            stages.end(TRAINED, {DIVERGED: str(error)})  # the same settings would diverge again
            raise
        trained = Trained.read(folder)
        stages.end(TRAINED, trained.digests)
        return trained

    def _prepare(self, trainings: Sequence[Any]) -> None:
        # Trainings of one process share accelerate's state, which holds the precision of the first.
        AcceleratorState._reset_state(reset_partial_state=True)
        for training in trainings:
            if isinstance(training, DreamBoothConfig):
                self._generate_class_images(training)

    def _lock(self, unit: Unit) -> FileLock:
        return locked(self.config.output_dir, str(unit).replace("/", "-"))

    def _generate_class_images(self, training: DreamBoothConfig) -> None:
        """Generate the class images before the training, by one worker alone: subjects and methods share them."""
        prior = training.data.prior
        if prior is None or prior.class_dir is not None:
            return
        wanted = ClassImages.of(training, training.data.class_prompt or "")
        key = digest_of_json(wanted.model_dump(mode="json"), sort_keys=True)[:16]
        with locked(self.config.output_dir, f"class-images-{key}"):
            accelerator = Accelerator(mixed_precision=training.training.mixed_precision)
            class_images(wanted, load_training_base(training, accelerator), prior.cache_dir, accelerator)

    def _generate(self, unit: Unit, trained: Trained) -> SubjectImages | MapImages:
        """Generate the images that are missing, and return all as evaluation finds them."""
        part, protocol = self.plan.part(unit.task)
        images, stages = self.plan.images_folder(unit), self.plan.stages(unit)
        options: dict[str, Any] = {"batch_size": part.batch_size, "device": self.config.device}
        content: Any
        if isinstance(protocol, SubjectProtocol):
            assert unit.subject is not None
            run = find_run(protocol, trained.run)
            content = [protocol.prompt(unit.subject, t, run.identifier) for t in protocol.templates(unit.subject)]
            files = [job.file for job in jobs_for(content, protocol.images_per_prompt)]
            photos = photos_of(unit.subject, part.dataset_dir)
            generate = partial(generate_run, protocol, run, images.parent, real=part.dataset_dir, **options)
            find = partial(self._find_subject, protocol, images, photos, run.identifier)
            drift = [job.file for job in jobs_for(protocol.drift_texts(unit.subject), 1)]
            further = {images / DRIFT / when: drift for when in (BEFORE, AFTER)} if drift else {}
        else:
            scenes, sources = self.plan.scenes, self._map_sources
            content = [(one.name, one.prompt, one.digest) for one in sources]
            files = [f"{one.file}.png" for one in sources]
            generate = partial(generate_map_images, protocol, trained.run, scenes, images, **options)
            find = partial(find_map_images, protocol, images, scenes)
            further = {}
        inputs = {
            **sampling_settings(protocol),
            "prompts": digest_of_json(content),
            "batch_size": part.batch_size,
            "weights": trained.digests,
        }
        if isinstance(protocol, SubjectProtocol) and protocol.drift_prompts:
            inputs["drift_prompts"] = protocol.drift_prompts
        before = stages.begin(DRAWN, inputs)
        whole = [
            drop_incomplete_batches(folder, names, part.batch_size) and (folder / LIST).is_file()
            for folder, names in {images: files, **further}.items()
        ]
        if before is None or not all(whole):
            print(f"{unit}: generating {len(files)} images", flush=True)
            generate()
            stages.end(DRAWN, {"images": len(files)})
        return find()

    def _find_subject(self, protocol: SubjectProtocol, *of_images: Any) -> SubjectImages:
        return with_gallery(protocol, read_subject(protocol, *of_images), self.plan.part("dreambooth")[0].dataset_dir)

    def _score(self, unit: Unit, found: SubjectImages | MapImages) -> None:
        part, protocol = self.plan.part(unit.task)
        path, stages = self.plan.scores_file(unit), self.plan.stages(unit)
        if isinstance(found, SubjectImages):
            files = [file for files in (*found.files.values(), *found.drift.values()) for file in files]
            compared: dict[str, Any] = {"photos": {photo.name: photo.digest for photo in found.photos}}
            compared |= {"gallery": gallery_digest(found.gallery)} if found.gallery else {}
        else:
            files, compared = list(found.files.values()), self.data.of_scenes(self.plan.scenes)
        inputs = {"protocol": protocol.digest, "judges": part.judges, "images": _digest(files), **compared}
        if stages.begin(SCORED, inputs, derived=True) is not None and path.is_file():
            return
        print(f"{unit}: scoring {len(files)} images", flush=True)
        scorers = self._scorers_of(unit.task)
        if isinstance(found, SubjectImages):
            assert isinstance(protocol, SubjectProtocol)
            scored = score_subject(found, protocol, scorers, part.batch_size, self._gallery_features)
            save_scores(path, scored, found, scorers)
        else:
            assert isinstance(protocol, MapProtocol)
            score_maps(protocol, self.plan.scenes, found, scorers, dict(found.facts), part.batch_size).save(path)
        stages.end(SCORED, {"images": len(files)})

    @cached_property
    def _map_sources(self) -> list[Source]:
        """The scenes with their captions, as images are generated from them."""
        assert self.plan.maps is not None
        return pair_sources(self.plan.scenes, self.plan.maps[1].resolution)

    def _scorers_of(self, task: str) -> dict[str, Loaded]:
        if task not in self._scorers:
            part, protocol = self.plan.part(task)
            self._scorers[task] = load_scorers(protocol.judges, part.judges, str(pick_device(self.config.device)))
        return self._scorers[task]


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and bytes."""
    digest = Digest()
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ")
        digest.update(file.read_bytes())
    return digest.hex()

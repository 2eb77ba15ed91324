"""A worker of a benchmark: trains, draws and scores one unit after another, and goes on where another one stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.map_images import find_map_images, generate_map_images
from ether_diffusion.evaluation.map_scores import score_maps
from ether_diffusion.evaluation.protocols import Protocol
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.evaluation.subject_images import LIST, SubjectImages, photos_of, read_subject
from ether_diffusion.evaluation.subject_runs import find_run, generate_run
from ether_diffusion.evaluation.subject_scores import score_subject
from ether_diffusion.generation import jobs_for, pair_sources, pick_device, read_run
from ether_diffusion.models.condition_encoder import condition_encoder_digest
from ether_diffusion.training import controllable, dreambooth, start
from ether_diffusion.training.checkpoint import flatten
from ether_diffusion.training.class_images import ClassImages, class_images
from ether_diffusion.training.loop import Diverged

from .config import BenchmarkConfig, Part, Unit
from .inputs import BenchmarkData
from .plan import Plan
from .score_files import save_scores
from .stages import Stages, drop_broken_batches, locked

TRAINED, DRAWN, SCORED = "trained", "drawn", "scored"
DIVERGED = "diverged"
"""Why a training came to no weights: what its stage holds in their place."""

# Settings of a training that its weights do not depend on, or that are told by the photos or pairs themselves.
IGNORED_SETTINGS = (
    "output_dir", "allow_pickle", "training.resume", "training.tracker", "training.workers", "training.keep_states",
    "training.keep_checkpoints", "training.checkpoint_every", "validation.", "data.instance_dir", "data.dataset_dir",
    "data.cache_dir", "data.prior.cache_dir",
)  # fmt: skip


class Worker:
    """Does units. What does not depend on the unit, such as judges, is loaded once."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config, self.plan = config, Plan(config)
        self.judges: dict[str, dict[str, Loaded]] = {}
        self.data = BenchmarkData(config.output_dir)
        if config.threads is not None:
            # The trainer takes all the cores unless this says how many.
            os.environ["OMP_NUM_THREADS"] = str(config.threads)
            torch.set_num_threads(config.threads)

    def do(self, unit: Unit) -> None:
        """Train, draw and score, as far as that is not done.

        Raises:
            UserError: something is there that was made with other settings; or as the stages raise.
            TrainingFailed: the training cannot go on.
            Interrupted: a signal came while training; a checkpoint was written.
        """
        # Of two that are given the same unit, one finds it done.
        with locked(self.config.output_dir, str(unit).replace("/", "-")):
            self._train(unit, Stages(stages_file(self.plan, unit)))
            for reading in self.plan.readings(unit):
                stages = Stages(stages_file(self.plan, reading))
                if unit.subject is not None:
                    found = self._generate_subject(reading, stages)
                    self._score_subject(reading, stages, found)
                else:
                    self._generate_maps(reading, stages)
                    self._score_maps(reading, stages)

    def _train(self, unit: Unit, stages: Stages) -> None:
        training, folder = self.plan.training(unit), self.plan.run_folder(unit)
        settings = flatten(training.model_dump(mode="json"))
        inputs: dict[str, Any] = {key: v for key, v in settings.items() if not key.startswith(IGNORED_SETTINGS)}
        if unit.subject is not None:
            inputs |= self.data.of_subject(training, self._photos(unit.subject))
        else:
            inputs |= self.data.of_pairs(training)
        before = stages.begin(TRAINED, inputs)
        if before is not None and DIVERGED in before:
            raise Diverged(before[DIVERGED])
        if before is not None and before == _weights(folder):
            return
        print(f"{unit}: training", flush=True)
        # Trainings of one process share accelerate's state, which holds the precision of the first.
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            if unit.task == dreambooth.TASK:
                self._generate_class_images(training)
                dreambooth.run(training)
            else:
                controllable.run(training)
        except Diverged as error:
            stages.end(TRAINED, {DIVERGED: str(error)})  # the same settings would end the same way
            raise
        stages.end(TRAINED, _weights(folder) or {})

    def _generate_class_images(self, training: dreambooth.DreamBoothConfig) -> None:
        """Before the training that needs them, by one worker alone: they are shared by subjects and methods."""
        prior = training.data.prior
        if prior is None or prior.class_dir is not None:
            return
        wanted = ClassImages(
            base_model=training.base_model,
            prompt=training.data.class_prompt or "",
            num_images=prior.num_images,
            resolution=training.data.resolution,
            seed=prior.seed,
            sampling=prior.sampling,
        )
        told = json.dumps(wanted.model_dump(mode="json"), sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        with locked(self.config.output_dir, f"class-images-{key}"):
            accelerator = Accelerator(mixed_precision=training.training.mixed_precision)
            class_images(wanted, start.start_base(training, accelerator), prior.cache_dir, accelerator)

    def _generate_subject(self, unit: Unit, stages: Stages) -> SubjectImages:
        part, protocol = self._subjects
        assert unit.subject is not None
        source = self._source(unit, part)
        images = images_folder(self.plan, unit)
        run, photos = find_run(protocol, source), self._photos(unit.subject)
        prompts = [protocol.prompt(unit.subject, t, run.identifier) for t in protocol.templates(unit.subject)]
        files = [job.file for job in jobs_for(prompts, protocol.images_per_prompt)]
        before = stages.begin(DRAWN, self._drawing(source, protocol, prompts, part))
        whole = drop_broken_batches(images, files, part.batch_size)
        if before is not None and whole and (images / LIST).is_file():
            return read_subject(protocol, images, photos, run.identifier)
        print(f"{unit}: drawing {len(files)} images", flush=True)
        options: dict[str, Any] = {"batch_size": part.batch_size, "device": self.config.device}
        found = generate_run(protocol, run, images.parent, real=part.dataset_dir, **options)
        stages.end(DRAWN, {"images": len(files)})
        return found

    def _score_subject(self, unit: Unit, stages: Stages, found: SubjectImages) -> None:
        part, protocol = self._subjects
        path = scores_file(self.plan, unit)
        drawn = [file for files in found.drawn.values() for file in files]
        inputs = {
            "protocol": protocol.digest,
            "judges": part.judges,
            "images": _digest(drawn),
            "photos": {photo.name: photo.digest for photo in found.photos},
        }
        if stages.begin(SCORED, inputs, derived=True) is not None and path.is_file():
            return
        print(f"{unit}: scoring {len(drawn)} images", flush=True)
        judges = self._judges(unit.task)
        save_scores(path, score_subject(found, protocol, judges, part.batch_size), found, judges)
        stages.end(SCORED, {"images": len(drawn)})

    def _generate_maps(self, unit: Unit, stages: Stages) -> None:
        part, protocol = self._maps
        source, images = self._source(unit, part), images_folder(self.plan, unit)
        sources = pair_sources(self.plan.scenes, protocol.resolution)
        conditions = [(one.name, one.prompt, one.digest) for one in sources]
        before = stages.begin(DRAWN, self._drawing(source, protocol, conditions, part))
        whole = drop_broken_batches(images, [f"{one.file}.png" for one in sources], part.batch_size)
        if before is not None and whole and (images / LIST).is_file():
            return
        print(f"{unit}: drawing {len(sources)} images", flush=True)
        options: dict[str, Any] = {"batch_size": part.batch_size, "device": self.config.device}
        generate_map_images(protocol, source, self.plan.scenes, images, **options)
        stages.end(DRAWN, {"images": len(sources)})

    def _score_maps(self, unit: Unit, stages: Stages) -> None:
        part, protocol = self._maps
        images, path = images_folder(self.plan, unit), scores_file(self.plan, unit)
        found = find_map_images(protocol, images, self.plan.scenes)
        inputs = {
            "protocol": protocol.digest,
            "judges": part.judges,
            "images": _digest(found.files.values()),
            **self.data.of_scenes(self.plan.scenes),
        }
        if stages.begin(SCORED, inputs, derived=True) is not None and path.is_file():
            return
        print(f"{unit}: scoring {len(found.files)} images", flush=True)
        judges = self._judges(unit.task)
        score_maps(protocol, self.plan.scenes, found, judges, dict(found.facts), part.batch_size).save(path)
        stages.end(SCORED, {"images": len(found.files)})

    def _source(self, unit: Unit, part: Part) -> Path:
        """What to draw from: the run, or one of its checkpoints."""
        folder, step = self.plan.run_folder(unit), unit.step or part.checkpoint
        return folder if step is None else folder / "checkpoints" / f"step-{step:06d}"

    def _drawing(self, source: Path, protocol: Protocol, what: Any, part: Part) -> dict[str, Any]:
        """What images depend on."""
        drawn = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        settings = sampling_settings(protocol)
        return {**settings, "prompts": drawn, "batch_size": part.batch_size, "weights": _weights(source)}

    def _judges(self, task: str) -> dict[str, Loaded]:
        if task not in self.judges:
            part, protocol = self.plan.part(task)
            stated = protocol.judges
            self.judges[task] = load_scorers(stated, part.judges, str(pick_device(self.config.device)))
        return self.judges[task]

    def _photos(self, subject: str) -> Any:
        return photos_of(subject, self._subjects[0].dataset_dir)

    @property
    def _subjects(self) -> Any:
        assert self.plan.subjects is not None
        return self.plan.subjects

    @property
    def _maps(self) -> Any:
        assert self.plan.maps is not None
        return self.plan.maps


def stages_file(plan: Plan, unit: Unit) -> Path:
    """What is known of a unit's stages."""
    folder = plan.folder(unit.task, unit.method, unit.step)
    return folder / "stages" / f"{unit.subject}.json" if unit.subject else folder / "stages.json"


def images_folder(plan: Plan, unit: Unit) -> Path:
    """Where the list of the images lies that a unit draws."""
    folder = plan.folder(unit.task, unit.method, unit.step)
    return folder / "images" / unit.subject if unit.subject else folder


def scores_file(plan: Plan, unit: Unit) -> Path:
    """Of a unit: a subject's scores, or the results of a method that has no subjects."""
    folder = plan.folder(unit.task, unit.method, unit.step)
    return folder / "scores" / f"{unit.subject}.json" if unit.subject else folder / RESULTS


def sampling_settings(protocol: Protocol) -> dict[str, Any]:
    """What a protocol says of how images are drawn."""
    return protocol.model_dump(mode="json", include={"resolution", "seed", "images_per_prompt", "sampling"})


def _weights(path: Path) -> dict[str, str] | None:
    """Digests of what was trained; None if it is not there."""
    try:
        run = read_run(path)
    except UserError:
        return None
    found = {"adapter": run.adapter.digest} if run.adapter is not None else {}
    if run.condition_encoder is not None:
        found["condition_encoder"] = condition_encoder_digest(run.condition_encoder)
    return found


def _digest(files: Iterable[Path]) -> str:
    """Of names and bytes."""
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return hashed.hexdigest()

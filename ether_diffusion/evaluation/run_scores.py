"""Scores of runs, of their checkpoints, or of folders of images, under a protocol of either kind."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.data.other_worlds import pairs_note, photos_note
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.errors import UserError
from ether_diffusion.generation import checkpoints_of
from ether_diffusion.models.bases import TINY
from ether_diffusion.own_files import check_own

from .comparison import FILE as CHOICE
from .comparison import Choice, choose
from .galleries import GalleryFeatures
from .map_images import MapImages, find_map_images, generate_map_images
from .map_scores import check_segmenters, score_maps
from .protocols import MapProtocol, SubjectProtocol
from .results import FILE, Results
from .scorers import Loaded
from .subject_images import (
    SubjectImages,
    check_one_method,
    find_images,
    find_run,
    generate_run,
    recorded_settings,
)
from .subject_scores import score_subject, subject_results


@dataclass(frozen=True, kw_only=True)
class RunScores(ABC):
    """What runs and folders are scored with.

    Attributes:
        scorers: Those of the protocol, loaded.
        batch_size: Images at a time, generated and scored.
        device: Where images are generated; None: CUDA, else MPS, else the CPU.
    """

    protocol: SubjectProtocol | MapProtocol
    scorers: Mapping[str, Loaded]
    batch_size: int = 8
    device: str | None = None

    @abstractmethod
    def of_runs(self, runs: Sequence[Path], output: Path) -> Results:
        """Generate the protocol's images of runs into OUTPUT, score them, and write OUTPUT/results.json.

        Complete images are kept.

        Raises:
            UserError: runs that do not fit the protocol, or images there that were made with other settings.
        """

    @abstractmethod
    def of_images(self, folder: Path, output: Path) -> Results:
        """Score the images in a folder, and write OUTPUT/results.json.

        Raises:
            UserError: another layout, or images that the protocol does not take.
        """

    def of_checkpoints(self, run: Path, output: Path) -> Choice:
        """Score every checkpoint of a run into OUTPUT/step-…, and write the Pareto set, OUTPUT/checkpoints.json.

        Raises:
            UserError: as `of_runs`; or the run kept no checkpoint.
        """
        checkpoints = checkpoints_of(run)
        check_own(output / CHOICE, *(output / name / FILE for name in checkpoints))
        results = {name: self.of_runs([folder], output / name) for name, folder in checkpoints.items()}
        choice = choose(self.protocol, results)
        choice.save(output)
        return choice


@dataclass(frozen=True, kw_only=True)
class SubjectRunScores(RunScores):
    """Of a protocol of subjects: a run is of one subject.

    Attributes:
        real: The folder of the subjects' photos, or `builtin:`; None: those that each run was trained on.
        identifier: The word for the subject in the prompts of a folder of images; None: the protocol's.
    """

    protocol: SubjectProtocol
    real: str | None = None
    identifier: str | None = None

    def of_runs(self, runs: Sequence[Path], output: Path) -> Results:
        found = [find_run(self.protocol, run) for run in runs]
        check_one_method({run.subject: {"method": run.method} for run in found})
        options = {"real": self.real, "batch_size": self.batch_size, "device": self.device}
        images = [generate_run(self.protocol, run, output / "images", **options) for run in found]
        return self._score(images, output, [one.name for one in images])

    def of_images(self, folder: Path, output: Path) -> Results:
        if self.real is None:
            raise UserError(f"--images {folder}: needs --real, the photos of its subjects.")
        return self._score(find_images(self.protocol, folder, self.real, self.identifier), output, None)

    def _score(self, images: Sequence[SubjectImages], output: Path, subjects: Sequence[str] | None) -> Results:
        """One subject after another.

        Args:
            subjects: Those that have to be there; None: all of the protocol's.
        """
        settings = recorded_settings(images)  # refuses what does not go together before anything is scored
        if self.protocol.base_model == TINY:
            self._note_unknown_world(images)
        known: GalleryFeatures = {}
        scored = (score_subject(one, self.protocol, self.scorers, self.batch_size, known) for one in images)
        results = subject_results(self.protocol, scored, self.scorers, settings, subjects)
        results.save(output / FILE)
        return results

    def _note_unknown_world(self, images: Sequence[SubjectImages]) -> None:
        """Say once that photos are not of the miniature's world."""
        for one in images:
            sizes = [photo.size for photo in one.photos]
            if note := photos_note(f"photos of {one.name}", sizes, self.protocol.subjects[one.name].class_name):
                print(f"Note: {note}.", file=sys.stderr)
                return


@dataclass(frozen=True, kw_only=True)
class MapRunScores(RunScores):
    """Of a protocol of label maps: a run or a folder has one image of each scene.

    Attributes:
        pairs: The scenes, as `find_scenes` gives them.
    """

    protocol: MapProtocol
    pairs: Pairs

    def of_runs(self, runs: Sequence[Path], output: Path) -> Results:
        if len(runs) != 1:
            raise UserError(f"{self.protocol.name} scores one run at a time, not {len(runs)}.")
        check_segmenters(self.protocol, self.scorers)  # before long work
        options = {"batch_size": self.batch_size, "device": self.device}
        return self._score(generate_map_images(self.protocol, runs[0], self.pairs, output, **options), output)

    def of_images(self, folder: Path, output: Path) -> Results:
        return self._score(find_map_images(self.protocol, folder, self.pairs), output)

    def _score(self, images: MapImages, output: Path) -> Results:
        if self.protocol.base_model == TINY and (note := pairs_note(self.pairs)):
            print(f"Note: {note}.", file=sys.stderr)
        results = score_maps(self.protocol, self.pairs, images, self.scorers, dict(images.facts), self.batch_size)
        results.save(output / FILE)
        return results

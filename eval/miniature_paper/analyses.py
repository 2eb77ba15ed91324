"""The analyses of the miniature paper as jobs. A result is kept as long as its recorded inputs are the same."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ether_diffusion.analysis.analysed_run import AnalysedRun, Bases, analysed_run
from ether_diffusion.analysis.changes import changes_of
from ether_diffusion.analysis.energy import BaseEnergies
from ether_diffusion.analysis.geometry import distances, mean_distance
from ether_diffusion.analysis.perturbation import PERTURBATIONS, perturbed
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.image_records import base_digest
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.files import step_of, write_whole
from ether_diffusion.generation import checkpoints_of, jobs_for, load_pipeline, read_run, sample_images
from ether_diffusion.input_files import read_json
from ether_diffusion.metrics import ClipTextScore
from ether_diffusion.pictures import save_png

NO_CHANGE = "base"
"""The kind of perturbation that does not change the base."""


@dataclass(frozen=True)
class RunJob(ABC):
    """An analysis of one run."""

    run: Path
    file: Path
    what: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.what} of {self.run.parent.parent.name}"

    def do(self) -> None:
        """Write the run's method, learning rate and numbers."""
        digest = read_run(self.run).trained.digest
        if _known(self.file, digest) is None:
            run = analysed_run(self.run)
            facts = {name: run.facts[name] for name in ("method", "learning_rate")}
            _write(self.file, digest, {**facts, **self.measure(run)})

    @abstractmethod
    def measure(self, run: AnalysedRun) -> Mapping[str, Any]:
        """The numbers."""


class DistanceJob(RunJob):
    """The distances of transforms and weights (Fig. 4): `transform`, `weight` and `relative`, means over layers."""

    what = "distances"

    def measure(self, run: AnalysedRun) -> Mapping[str, Any]:
        return asdict(mean_distance(distances(changes_of(Bases().unet(run), run.path))))


class EnergyJob(RunJob):
    """The change of hyperspherical energy over the checkpoints (Fig. 7).

    `changes`: by step, the sum over layers of the means over pairs, as in OFT's code.
    """

    what = "energy"

    def measure(self, run: AnalysedRun) -> Mapping[str, Any]:
        unet, energies, changes = Bases().unet(run), BaseEnergies(), {"0": 0.0}
        for folder in checkpoints_of(self.run).values():
            rows = energies.changes(changes_of(unet, folder))
            changes[str(step_of(folder))] = sum(row.mean_change for row in rows)
        return {"changes": changes}


@dataclass(frozen=True)
class PerturbationJob:
    """Images of the frozen base under random transforms of one distance, and their prompt fidelity (Fig. 3).

    Attributes:
        kind: One of `PERTURBATIONS`, or `base`: no transform.
        layers: Endings of the names of the transformed layers.
        subjects: The subjects whose prompts are used, without the identifier.
        prompts: The number of prompts of each subject.
    """

    protocol: str
    kind: str
    distance: float
    layers: tuple[str, ...]
    subjects: tuple[str, ...]
    prompts: int
    file: Path

    def __str__(self) -> str:
        return "the unperturbed base" if self.kind == NO_CHANGE else f"{self.kind} at distance {self.distance:g}"

    @property
    def pictures(self) -> Path:
        """The folder of the images, which are named by number."""
        return self.file.with_suffix("")

    def do(self) -> None:
        """Write `clip_t`, the mean cosine similarity of images and prompts, and the images."""
        protocol = load_protocol(SubjectProtocol, self.protocol)
        pipeline = load_pipeline(None, base_model=protocol.base_model, device="cpu")[0]
        prompts = [
            protocol.prompt(subject, template, "")
            for subject in self.subjects
            for template in protocol.templates(subject)[: self.prompts]
        ]
        stated = protocol.model_dump(mode="json", include={"sampling", "seed", "resolution", "judges"})
        inputs = {**stated, "prompts": prompts, "layers": self.layers, "base": base_digest(pipeline)}
        if _known(self.file, inputs) is not None:
            return
        scorer: Any = load_scorers(protocol.judges)[_text_scorer(protocol)].network
        jobs = [job for prompt in dict.fromkeys(prompts) for job in jobs_for([prompt], 1)]
        samples = sample_images(
            pipeline, jobs, protocol.sampling, seed=protocol.seed, resolution=protocol.resolution, batch_size=8
        )
        if self.kind == NO_CHANGE:
            images = [image for _, image in samples]
        else:
            endings = tuple(f".{layer}" for layer in self.layers)
            names = [name for name, _ in pipeline.unet.named_modules() if name.endswith(endings)]
            with perturbed(pipeline.unet, names, self.kind, self.distance):
                images = [image for _, image in samples]
        for number, image in enumerate(images):
            save_png(image, self.pictures / f"{number:02d}.png", {"prompt": jobs[number].prompt})
        keys = [str(number) for number in range(len(images))]
        pairs = ClipTextScore(scorer).update(images, [job.prompt for job in jobs], keys, subject="").pairs()[""]
        value = float(pairs.values[pairs.counted].mean())
        title = PERTURBATIONS[self.kind].title if self.kind in PERTURBATIONS else "base"
        _write(self.file, inputs, {"method": title, "distance": self.distance, "clip_t": value})


def read_analysis(file: Path) -> Mapping[str, Any] | None:
    """The result of a job; None if there is none, or another file: the job is done again."""
    try:
        found = read_json(file)
    except UserError:
        return None
    return found if isinstance(found, dict) and "inputs" in found else None


def _text_scorer(protocol: SubjectProtocol) -> str:
    names = [metric.judge for metric in protocol.metrics.values() if metric.kind == "text"]
    if not names:
        raise UserError(f"{protocol.name}: no metric of kind text, which scores perturbed bases.")
    return names[0]


def _known(file: Path, inputs: Any) -> Mapping[str, Any] | None:
    found = read_analysis(file)
    return found if found is not None and found["inputs"] == json.loads(json.dumps(inputs)) else None


def _write(file: Path, inputs: Any, outputs: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps({"inputs": inputs, **outputs}, indent=1) + "\n")

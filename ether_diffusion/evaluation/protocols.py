"""Protocols: what a benchmark's numbers mean, as data. A YAML file each, named and versioned; results name theirs.

A protocol states everything that moves a number: subjects and prompts, how images are drawn, judges and what they are
shown, pairs and averages. Results of protocols that differ anywhere are not compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveInt, model_validator

from ether_diffusion.config import ConfigError, Settings, load_config
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.generation import ControllableSampling, Sampling

from .scorers import FeatureJudge, MapJudge

FILES = Path(__file__).parent / "protocol_files"

Averaging = Literal["flat", "macro"]
"""flat: every pair of two images weighs the same, whatever its subject. macro: every subject weighs the same."""


class Bootstrap(Settings):
    """How intervals are found: what was drawn is drawn again from itself, with replacement."""

    replicates: PositiveInt = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0


Bounds = tuple[float, float]
"""What a metric's values can be, from the lowest to the highest; an interval speaks of nothing beyond."""


class _Metric(Settings):
    judge: str
    higher_is_better: ClassVar[bool] = True

    @property
    def bounds(self) -> Bounds:
        """Of cosines; of other metrics as they say."""
        return (-1.0, 1.0)


class Similarity(_Metric):
    """Mean cosine of features of generated and real images: DINO, CLIP-I."""

    kind: Literal["similarity"]


class Text(_Metric):
    """Mean cosine of features of an image and its prompt: CLIP-T."""

    kind: Literal["text"]
    identifier: bool = False
    """Whether the prompt keeps the identifier, a word that CLIP does not know."""


class Distance(_Metric):
    """Mean LPIPS of generated and real images; the papers read it as diversity."""

    kind: Literal["distance"]

    @property
    def bounds(self) -> Bounds:
        return (0.0, math.inf)


class Diversity(_Metric):
    """Mean LPIPS among the generated images of one prompt, each pair once."""

    kind: Literal["diversity"]

    @property
    def bounds(self) -> Bounds:
        return (0.0, math.inf)


SubjectMetric = Annotated[Similarity | Text | Distance | Diversity, Field(discriminator="kind")]


class SubjectEntry(Settings):
    """A subject, by what it is one of, and the list of prompts that it is drawn from."""

    class_name: str
    prompts: str


class Protocol(Settings):
    """What all protocols state."""

    name: str
    """KIND/VERSION."""
    base_model: str | None = None
    """The one base whose pictures the judges know; null: any."""
    resolution: PositiveInt
    """Side of the images, in pixels."""
    seed: int = 0
    """Of the images that are drawn for it."""
    bootstrap: Bootstrap = Bootstrap()
    chosen_by: tuple[str, str]
    """The two metrics by which checkpoints are chosen: likeness and faithfulness, which pull apart."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that the protocol states."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class SubjectProtocol(Protocol):
    """Subject-driven generation (PROTOCOL of the DreamBooth tables): photos of subjects, images of prompts."""

    task: Literal["dreambooth"]
    identifier: str
    """The word for the subject in prompts, unless the run used another."""
    images_per_prompt: PositiveInt
    pairs: Literal["all"]
    """What is compared: every photo of a subject with every image of it. No first few of either."""
    averaging: Averaging
    sampling: Sampling
    judges: dict[str, FeatureJudge]
    metrics: dict[str, SubjectMetric]
    subjects: dict[str, SubjectEntry]
    prompts: dict[str, tuple[str, ...]]
    """Lists of templates: `{subject}` stands for the identifier and the class."""

    @model_validator(mode="after")
    def _check(self) -> SubjectProtocol:
        _check_metrics(self.chosen_by, self.metrics, self.judges)
        for name, subject in self.subjects.items():
            _known(f"subjects.{name}.prompts", subject.prompts, self.prompts)
        for name, templates in self.prompts.items():
            bad = next((t for t in templates if t.count("{subject}") != 1 or templates.count(t) > 1), None)
            if bad is not None:
                raise ValueError(f"prompts.{name}: {bad!r}; expected {{subject}} once, and no template twice")
        return self

    def templates(self, subject: str) -> tuple[str, ...]:
        """The templates of a subject's prompts, in order."""
        return self.prompts[self.subjects[subject].prompts]

    def prompt(self, subject: str, template: str, identifier: str | None = None) -> str:
        """The prompt of a template: with an identifier, or "" for none."""
        word = self.identifier if identifier is None else identifier
        return template.format(subject=f"{word} {self.subjects[subject].class_name}".strip())

    def entry(self, subject: str, where: str) -> SubjectEntry:
        """What the protocol says of a subject, which is matched whole: `dog` is not `backpack_dog`.

        Raises:
            UserError: it has no such subject; `where` says who named it.
        """
        if subject not in self.subjects:
            near = did_you_mean(subject, self.subjects)
            known = ", ".join(self.subjects)
            raise UserError(f"{where}: {self.name} has no subject {subject!r}.{near} It has {known}.")
        return self.subjects[subject]


class MapMetric(_Metric):
    """Agreement of the label maps that a segmenter sees in the images with those that they were drawn under."""

    kind: Literal["segmentation"]
    value: Literal["miou", "miou_absent_zero", "mean_accuracy", "pixel_accuracy"]

    @property
    def bounds(self) -> Bounds:
        return (0.0, 1.0)


class SetMetric(_Metric):
    """Distance of the set of images from the set of real ones: FID, KID."""

    kind: Literal["distribution"]
    value: Literal["fid", "kid"]

    higher_is_better: ClassVar[bool] = False

    @property
    def bounds(self) -> Bounds:
        """KID is an unbiased estimate, which may fall below 0."""
        return (-math.inf if self.value == "kid" else 0.0, math.inf)


AnyMapMetric = Annotated[MapMetric | SetMetric, Field(discriminator="kind")]


class Framing(Settings):
    """What is shown of a scene, in its real image, its map and its hint alike. Trainings frame so, whatever is judged:
    it is stated because numbers depend on it, not to be chosen."""

    scale: Literal["short side to resolution"]
    image_filter: Literal["bicubic"]
    """Pillow's, with antialiasing."""
    label_filter: Literal["nearest"]
    crop: Literal["centre"]


class MapProtocol(Protocol):
    """Semantic maps to images, scored over a whole set of scenes."""

    task: Literal["controllable"]
    split: str
    images: PositiveInt
    """One of each pair of the split, the first by name. A split that has fewer is refused."""
    framing: Framing
    num_classes: PositiveInt
    """C of the labels 1 … C; 0 is unlabelled and never counts."""
    sampling: ControllableSampling
    judges: dict[str, MapJudge]
    metrics: dict[str, AnyMapMetric]
    distribution_replicates: PositiveInt = 50
    """Replicates for distances of sets, each of which costs a decomposition."""

    @model_validator(mode="after")
    def _check(self) -> MapProtocol:
        _check_metrics(self.chosen_by, self.metrics, self.judges)
        return self


P = TypeVar("P", bound=Protocol)


def load_protocol(model: type[P], name: str | Path) -> P:
    """A shipped protocol by its name, such as `dreambooth/subject-macro-v1`, or one's own by its file.

    Raises:
        UserError: no such protocol, or faults in its file, a line each.
    """
    shipped = {file.relative_to(FILES).with_suffix("").as_posix(): file for file in sorted(FILES.glob("*/*.yaml"))}
    if str(name) not in shipped and not Path(name).is_file():
        near = did_you_mean(str(name), shipped)
        raise UserError(f"no protocol {str(name)!r}: neither a file nor shipped.{near} Shipped: {', '.join(shipped)}.")
    protocol = load_config(model, shipped.get(str(name), Path(name)))
    if str(name) not in shipped and protocol.name in shipped:
        raise ConfigError(f"{name}: name: {protocol.name} is a shipped protocol's; expected a name of its own")
    return protocol


def _check_metrics(chosen_by: tuple[str, str], metrics: Mapping[str, _Metric], judges: Mapping[str, object]) -> None:
    for name, metric in metrics.items():
        _known(f"metrics.{name}.judge", metric.judge, judges)
    for name in chosen_by:
        _known("chosen_by", name, metrics)


def _known(where: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r};{did_you_mean(name, known)} expected one of {', '.join(known)}")

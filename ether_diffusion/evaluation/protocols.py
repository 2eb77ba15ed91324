"""Protocols: how a benchmark measures, as data: a YAML file each, named and versioned. Results name their protocol.

A protocol states everything that changes a number: subjects and prompts, how images are generated, scorers and their
preprocessing, pairs and averages. Results of protocols that differ in anything are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import yaml
from pydantic import model_validator

from ether_diffusion.config import ConfigError, Settings, load_config
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.files import digest_of_json
from ether_diffusion.generation import ControllableSampling, Sampling
from ether_diffusion.input_files import read_text
from ether_diffusion.limits import Count, Many, Seed, Side

from .intervals import Bootstrap
from .metric_kinds import RANKING, AnyMapMetric, Metric, SubjectMetric
from .scorers import FeatureScorer, MapScorer

FILES = Path(__file__).parent / "protocol_files"

Averaging = Literal["flat", "macro"]
"""flat: every pair of two images weighs the same, whatever its subject. macro: every subject weighs the same."""


class SubjectEntry(Settings):
    """A subject: its class, and the name of its list of prompts."""

    class_name: str
    prompts: str


class Protocol(Settings):
    """What every protocol states."""

    name: str
    """KIND/VERSION."""
    base_model: str | None = None
    """The only base whose images the scorers can score; null: any base."""
    resolution: Side
    """Side of the images, in pixels."""
    seed: Seed = 0
    """Seed of the images."""
    bootstrap: Bootstrap = Bootstrap()
    chosen_by: tuple[str, str]
    """The two metrics that choose checkpoints: subject and prompt fidelity, which pull apart."""
    unstated: ClassVar[Mapping[str, object]] = {}
    """Settings that the first protocols did not have, and the values that these had. They do not count in a digest."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the protocol states."""
        facts = self.model_dump(mode="json")
        stated = {k: v for k, v in facts.items() if k not in self.unstated or v != self.unstated[k]}
        return digest_of_json(stated, sort_keys=True)

    def check_base(self, run: str | Path, base_model: str | None) -> None:
        """Raise UserError for a run on another base than the scorers can score."""
        if self.base_model not in (None, base_model):
            needed = f"{self.name} scores images of base {self.base_model!r} only"
            raise UserError(f"{run}: trained on {base_model}; {needed}.")


class SubjectProtocol(Protocol):
    """Subject-driven generation, as in the DreamBooth tables: photos of subjects, images from prompts."""

    task: Literal["dreambooth"]
    identifier: str
    """The placeholder word for the subject in prompts, unless the run used another."""
    images_per_prompt: Many
    pairs: Literal["all"]
    """Every photo of a subject is compared with every image of it, not with a first few."""
    averaging: Averaging
    sampling: Sampling
    judges: dict[str, FeatureScorer]
    metrics: dict[str, SubjectMetric]
    subjects: dict[str, SubjectEntry]
    prompts: dict[str, tuple[str, ...]]
    """Lists of templates: `{subject}` stands for the identifier and the class."""
    drift_prompts: tuple[str, ...] = ()
    """Prompts for `drift`, of one image each; `{subject}` stands for the class alone."""
    look_alikes: Count | None = None
    """Rendered individuals of the subject's class in the gallery, next to the photos of the other subjects; of the
    miniature's world alone."""
    unstated: ClassVar[Mapping[str, object]] = {"drift_prompts": [], "look_alikes": None}

    @model_validator(mode="after")
    def _check(self) -> SubjectProtocol:
        _check_metrics(self.chosen_by, self.metrics, self.judges)
        self._check_drift()
        for name, subject in self.subjects.items():
            _known(f"subjects.{name}.prompts", subject.prompts, self.prompts)
        for name, templates in self.prompts.items():
            bad = next((t for t in templates if not _is_template(t) or templates.count(t) > 1), None)
            if bad is not None:
                wanted = "{subject} once and no other braces, and no template twice"
                raise ValueError(f"prompts.{name}: {bad!r}; expected {wanted}")
        return self

    def _check_drift(self) -> None:
        if bool(self.drift_prompts) != self.has("drift"):
            raise ValueError("drift_prompts: expected prompts if, and only if, a metric is of kind drift")
        for text in self.drift_prompts:
            if ("{" in text and not _is_template(text)) or self.drift_prompts.count(text) > 1:
                raise ValueError(f"drift_prompts: {text!r}; expected at most one {{subject}}, and no prompt twice")
        if self.look_alikes and not self.has(*RANKING):
            raise ValueError("look_alikes: no metric ranks a gallery; expected one of kind retrieval or rank")

    def has(self, *kinds: str) -> bool:
        """Whether it has a metric of one of these kinds."""
        return any(metric.kind in kinds for metric in self.metrics.values())

    def drift_texts(self, subject: str) -> tuple[str, ...]:
        """The prompts for `drift`, filled in for a subject: with its class, without an identifier."""
        return tuple(t.format(subject=self.subjects[subject].class_name) for t in self.drift_prompts)

    def templates(self, subject: str) -> tuple[str, ...]:
        """The templates of a subject's prompts, in order."""
        return self.prompts[self.subjects[subject].prompts]

    def prompt(self, subject: str, template: str, identifier: str | None = None) -> str:
        """The prompt of a template, with an identifier: None for the protocol's, "" for none."""
        word = self.identifier if identifier is None else identifier
        return template.format(subject=f"{word} {self.subjects[subject].class_name}".strip())

    def entry(self, subject: str, where: str) -> SubjectEntry:
        """The entry of a subject, matched by its whole name: `dog` is not `backpack_dog`.

        Raises:
            UserError: the protocol has no such subject; `where` is the file or setting that named it.
        """
        if subject not in self.subjects:
            near = did_you_mean(subject, self.subjects)
            known = ", ".join(self.subjects)
            raise UserError(f"{where}: {self.name} has no subject {subject!r}.{near} It has {known}.")
        return self.subjects[subject]


class Framing(Settings):
    """The part of a scene in its real image, map and hint alike. Numbers depend on it; trainings frame in this way."""

    scale: Literal["short side to resolution"]
    image_filter: Literal["bicubic"]
    """Pillow's, with antialiasing."""
    label_filter: Literal["nearest"]
    crop: Literal["centre"]


class MapProtocol(Protocol):
    """Semantic maps to images, scored over a whole set of scenes."""

    task: Literal["controllable"]
    split: str
    images: Many
    """One for each pair of the split, the first pairs by name. A split with fewer pairs is refused."""
    framing: Framing
    num_classes: Many
    """C of the labels 1 … C; 0 is unlabelled and is not scored."""
    sampling: ControllableSampling
    judges: dict[str, MapScorer]
    metrics: dict[str, AnyMapMetric]
    distribution_replicates: Many = 50
    """Samples for the intervals of distributions; each of FID's costs a matrix decomposition."""
    distribution_intervals: Literal["bootstrap", "jackknife"] = "bootstrap"
    """bootstrap: samples with repetition, which make FID's and KID's intervals too wide. jackknife: all images but one
    of `distribution_replicates` groups."""
    unstated: ClassVar[Mapping[str, object]] = {"distribution_intervals": "bootstrap"}

    @model_validator(mode="after")
    def _check(self) -> MapProtocol:
        _check_metrics(self.chosen_by, self.metrics, self.judges)
        return self


P = TypeVar("P", bound=Protocol)


def load_protocol(model: type[P], name: str | Path) -> P:
    """Read a shipped protocol by its name, such as `dreambooth/subject-macro-v1`, or the user's own by its file.

    Raises:
        UserError: no such protocol, or faults in its file, a line each.
    """
    shipped = _shipped()
    protocol = load_config(model, _file_of(name, shipped))
    if str(name) not in shipped and protocol.name in shipped:
        raise ConfigError(f"{name}: name: {protocol.name} is the name of a shipped protocol; expected another name")
    return protocol


def load_any_protocol(name: str | Path) -> SubjectProtocol | MapProtocol:
    """As `load_protocol`, for a protocol of either kind, which its `task` states."""
    try:
        stated = yaml.safe_load(read_text(_file_of(name, _shipped())))
    except (UserError, yaml.YAMLError):
        stated = None  # `load_protocol` reports the fault
    is_of_maps = isinstance(stated, dict) and stated.get("task") == "controllable"
    return load_protocol(MapProtocol if is_of_maps else SubjectProtocol, name)


def _shipped() -> dict[str, Path]:
    return {file.relative_to(FILES).with_suffix("").as_posix(): file for file in sorted(FILES.glob("*/*.yaml"))}


def _file_of(name: str | Path, shipped: Mapping[str, Path]) -> Path:
    if str(name) not in shipped and not Path(name).is_file():
        near = did_you_mean(str(name), shipped)
        raise UserError(f"no protocol {str(name)!r}: neither a file nor shipped.{near} Shipped: {', '.join(shipped)}.")
    return shipped.get(str(name), Path(name))


def _is_template(text: str) -> bool:
    rest = text.replace("{subject}", "", 1)
    return len(rest) < len(text) and "{" not in rest and "}" not in rest


def _check_metrics(chosen_by: tuple[str, str], metrics: Mapping[str, Metric], scorers: Mapping[str, object]) -> None:
    for name, metric in metrics.items():
        _known(f"metrics.{name}.judge", metric.judge, scorers)
    for name in chosen_by:
        _known("chosen_by", name, metrics)


def _known(where: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r};{did_you_mean(name, known)} expected one of {', '.join(known)}")

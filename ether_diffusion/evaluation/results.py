"""results.json: values with intervals, everything that they depend on, and the table that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import Tensor

from ether_diffusion.config import Settings
from ether_diffusion.data.pair_files import first_names
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import read_text
from ether_diffusion.own_files import write_own
from ether_diffusion.version import __version__

from .protocols import Protocol
from .scorers import Loaded

FILE = "results.json"
UNRECORDED = "not_told"
"""The key in `run` of the generation settings that the images do not record, and which could not be checked."""
_WHOLE_NUMBERS = re.compile(r"\[\n[\s\d,[\]]*\]")
"""Lists of whole numbers in indented JSON, whose strings hold no line ends."""
PACKAGES = ("torch", "transformers", "diffusers", "Pillow", "open_clip_torch", "lpips", "torch-fidelity", "timm")


class ScorerRecord(Settings):
    """A network that scored images."""

    source: str
    sha256: str
    """Digest of the weights, by name, shape and value: the same whatever file they came from."""


COUNTS = ("subjects", "images", "missing", "black", "duplicate")
"""The counts that every result has."""

ClassCounts = tuple[PositiveInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]
"""A class from 1 on, and its pixels in one image: correct, in the truth, predicted; on labelled pixels only."""


class MetricRecord(Settings):
    """One number, its bootstrap interval, and the parts that it is made of."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    higher_is_better: bool
    per_subject: dict[str, FiniteFloat] = Field(default_factory=dict)
    per_prompt: dict[str, FiniteFloat] = Field(default_factory=dict)
    per_class: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Of label maps: the classes that occur, by number."""
    absent_classes: list[int] = Field(default_factory=list)
    """Of label maps: the classes that occur neither in truth nor in predictions, and are left out of the mean."""


class Record(Settings):
    """What every result states.

    Attributes:
        data: Digests of what images were generated from and compared with: the photos of each subject, or the maps and
            captions of a split.
        absent_subjects: Subjects of the protocol without a score: not asked for, or without any image.
        ceilings: Metrics of real images among themselves, averaged as the protocol averages.
        ceilings_per_subject: The same by metric and subject; subjects with a single photo have none.
    """

    protocol: str
    protocol_digest: str
    judges: dict[str, ScorerRecord]
    data: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str]
    absent_subjects: list[str] = Field(default_factory=list)
    ceilings: dict[str, FiniteFloat] = Field(default_factory=dict)
    ceilings_per_subject: dict[str, dict[str, FiniteFloat]] = Field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, whole or not at all; lists of whole numbers take one line."""
        path = Path(path)
        left_out = {"per_image"} if not getattr(self, "per_image", None) else set()
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), indent=1, ensure_ascii=False)
        write_own(path, _WHOLE_NUMBERS.sub(lambda found: re.sub(r"\s+", "", found[0]), text) + "\n")
        return path


class Results(Record):
    """The result of one evaluation.

    Attributes:
        run: What was evaluated: base, adapters by subject with their digests, generation settings, and under
            `not_told` those settings that the images do not record.
        counts: `subjects`; `prompts` of all subjects; scored `images`; images `expected` of the subjects that were
            asked for; and how many are `black`, a `duplicate` of another, or `missing`.
        per_image: Of label maps, by segmenter and image: the classes that occur in the image.
    """

    run: dict[str, Any]
    counts: dict[str, NonNegativeInt]
    metrics: dict[str, MetricRecord]
    per_image: dict[str, dict[str, list[ClassCounts]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_counts(self) -> Results:
        if missing := [name for name in COUNTS if name not in self.counts]:
            raise ValueError(f"counts has no {', '.join(missing)}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Read a results.json, or that of a folder. Raises UserError for another file."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls.model_validate_json(read_text(path))
        except ValidationError as error:
            first = error.errors()[0]
            what = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
            raise UserError(f"{path}: not results of an evaluation ({what}).") from None

    def class_counts(self, segmenter: str, num_classes: int) -> Tensor:
        """(N, 3, C) int64: `per_image` as `metrics.segmentation.class_counts` gave it; N = 0 if it was not kept.

        Raises:
            UserError: a class above C.
        """
        images = self.per_image.get(segmenter, {})
        highest = max((number for classes in images.values() for number, *_ in classes), default=0)
        if highest > num_classes:
            raise UserError(f"per_image.{segmenter} counts class {highest}; {self.protocol} has {num_classes} classes.")
        counts = torch.zeros(len(images), 3, num_classes, dtype=torch.int64)
        for image, classes in zip(counts, images.values(), strict=True):
            for number, *pixels in classes:
                image[:, number - 1] = torch.tensor(pixels)
        return counts

    def table(self) -> str:
        """The table for a terminal."""
        rows = [("", "value", "interval", "real images")]
        for name, metric in self.metrics.items():
            better = "higher" if metric.higher_is_better else "lower"
            span = f"{metric.low:.3f} … {metric.high:.3f}"
            ceiling = f"{self.ceilings[name]:.3f}" if name in self.ceilings else ""
            rows.append((f"{name} ({better} is better)", f"{metric.value:.3f}", span, ceiling))
        title = ": ".join(filter(None, [self.protocol, sampled_with(self.run)]))
        return "\n".join([title, aligned(rows), self.counted()])

    def counted(self) -> str:
        """The counts in a sentence, and then `absent`, without subjects that nobody asked for."""
        c = self.counts
        of = f"{c['images']:,} of {c['expected']:,} images" if "expected" in c else f"{c['images']:,} images"
        subjects = f"{subjects_of(c['subjects'], self.absent_subjects)}, " if c["subjects"] else ""
        faults = f"{c['missing']} missing, {c['black']} black, {c['duplicate']} duplicate"
        notes = self.absent() if c["missing"] else self.model_copy(update={"absent_subjects": []}).absent()
        return "; ".join([f"{subjects}{of}", faults, *notes])

    def absent(self) -> list[str]:
        """In words: the absent subjects, the settings that the images do not record, and metrics that leave out
        classes."""
        notes = [f"without {first_names(self.absent_subjects)}"] if self.absent_subjects else []
        if unrecorded := self.run.get(UNRECORDED):
            notes.append(f"generated with {unrecorded} not recorded")
        return notes + [
            f"{name} over the {len(metric.per_class)} of {len(metric.per_class) + len(metric.absent_classes)} classes "
            "that occur"
            for name, metric in self.metrics.items()
            if metric.absent_classes
        ]


def sampled_with(settings: Mapping[str, Any]) -> str:
    """`dpm++, 20 steps, guidance 4, seed 0`: as many of these settings as are recorded."""
    words = {"scheduler": "{}", "steps": "{} steps", "guidance": "guidance {}", "seed": "seed {}"}
    known = {name: settings.get(name) for name in words}
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in known.items()}
    return ", ".join(words[name].format(value) for name, value in shown.items() if value is not None)


def subjects_of(number: int, absent: Sequence[str]) -> str:
    """`1 of 30 subjects`; `30 subjects` where none is absent."""
    return f"{number} of {number + len(absent)} subjects" if absent else f"{number} subjects"


def provenance(protocol: Protocol, scorers: Mapping[str, Loaded]) -> dict[str, Any]:
    """The fields of results that name the protocol, the scorers and the versions."""
    return {
        "protocol": protocol.name,
        "protocol_digest": protocol.digest,
        "judges": {name: ScorerRecord(source=one.source, sha256=one.sha256) for name, one in scorers.items()},
        "versions": versions(),
    }


def per_class_counts(counts: Tensor) -> list[ClassCounts]:
    """(3, C) integers of one image, as `metrics.segmentation.class_counts` gives them, without absent classes."""
    occurring = counts.any(dim=0).nonzero().flatten().tolist()
    return [(k + 1, *counts[:, k].tolist()) for k in occurring]


def versions() -> dict[str, str]:
    """The versions of this package and of those that numbers may depend on."""
    found = {"ether_diffusion": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

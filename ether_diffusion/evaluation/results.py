"""results.json: values with intervals, and everything that they depend on; and the table that shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ether_diffusion.config import Settings
from ether_diffusion.data.pair_files import shown
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.version import __version__

FILE = "results.json"
UNRECORDED = "not_told"
"""In `run`: the settings of the drawing that the images do not tell, so that nobody could check them."""
PACKAGES = ("torch", "transformers", "diffusers", "Pillow", "open_clip_torch", "lpips", "torch-fidelity", "timm")


class ScorerRecord(Settings):
    """A network that gave numbers."""

    source: str
    sha256: str
    """Of its weights, by name, shape and value: the same whatever file they came from."""


class MetricRecord(Settings):
    """One number, with its bootstrap interval and what it is made of."""

    value: float
    low: float
    high: float
    higher_is_better: bool
    per_subject: dict[str, float] = Field(default_factory=dict)
    per_prompt: dict[str, float] = Field(default_factory=dict)
    per_class: dict[str, float] = Field(default_factory=dict)
    """Of label maps: classes that occur, by number."""
    absent_classes: list[int] = Field(default_factory=list)
    """Of label maps: numbers of the classes that occur neither in truth nor in predictions, and do not count."""


class Results(Settings):
    """What one evaluation found.

    Attributes:
        run: What was evaluated: base, adapters by subject with their digests, settings of the drawing, and under
            `not_told` those of them that the images do not tell.
        data: Digests of what images were drawn from and measured against: the photos of each subject, or the maps and
            captions of a split.
        counts: `subjects`, `prompts` (of all subjects), `images` that were scored, `expected` of the subjects that were
            asked for, and those of the images that are `black` or a `duplicate` of another, and of the expected that
            are `missing`.
        absent_subjects: Those of the protocol that no number speaks of: not asked for, or without any image.
        ceilings: Metrics of real images among themselves.
        ceilings_per_subject: The same by metric and subject.
    """

    protocol: str
    protocol_digest: str
    run: dict[str, Any]
    judges: dict[str, ScorerRecord]
    data: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str]
    counts: dict[str, int]
    absent_subjects: list[str] = Field(default_factory=list)
    metrics: dict[str, MetricRecord]
    ceilings: dict[str, float] = Field(default_factory=dict)
    ceilings_per_subject: dict[str, dict[str, float]] = Field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all."""
        path = Path(path)
        write_whole(path, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Raises UserError for a file that is not one."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: not results of an evaluation ({place}: {first['msg']}).") from None

    def table(self) -> str:
        """For a terminal."""
        rows = [("", "value", "interval", "real images")]
        for name, metric in self.metrics.items():
            better = "higher" if metric.higher_is_better else "lower"
            span = f"{metric.low:.3f} … {metric.high:.3f}"
            ceiling = f"{self.ceilings[name]:.3f}" if name in self.ceilings else ""
            rows.append((f"{name} ({better} is better)", f"{metric.value:.3f}", span, ceiling))
        return "\n".join([self.protocol, aligned(rows), self.counted()])

    def counted(self) -> str:
        """The counts, in a sentence."""
        c = self.counts
        of = f"{c['images']:,} of {c['expected']:,} images" if "expected" in c else f"{c['images']:,} images"
        subjects = f"{subjects_of(c['subjects'], self.absent_subjects)}, " if c["subjects"] else ""
        faults = f"{c['missing']} missing, {c['black']} black, {c['duplicate']} duplicate"
        return "; ".join([f"{subjects}{of}", faults, *self.absent()])

    def absent(self) -> list[str]:
        """Which subjects are absent, what the images do not tell of their drawing, and which metrics left out classes,
        in words."""
        without, unknown = self.absent_subjects, self.run.get(UNRECORDED)
        told = [f"without {shown(without)}"] * bool(without) + [f"drawn with {unknown} not told"] * bool(unknown)
        return told + [
            f"{name} over the {len(metric.per_class)} of {len(metric.per_class) + len(metric.absent_classes)} classes "
            "that occur"
            for name, metric in self.metrics.items()
            if metric.absent_classes
        ]


def subjects_of(number: int, absent: Sequence[str]) -> str:
    """`1 of 30 subjects`; `30 subjects` where none is absent."""
    return f"{number} of {number + len(absent)} subjects" if absent else f"{number} subjects"


def versions() -> dict[str, str]:
    """Of this package and of those that numbers may depend on."""
    found = {"ether_diffusion": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

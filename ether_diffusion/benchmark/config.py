"""Settings of a benchmark: which methods are trained on what, and the protocol that they are scored by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PositiveInt, field_validator, model_validator

from ether_diffusion.config import Settings

NAME = r"[\w.+-]+"


class Method(Settings):
    """What is trained: a training config, and what is changed in it."""

    config: str
    """A YAML file, or a shipped config's name, of the part's task."""
    settings: tuple[str, ...] = ()
    """`section.key=value`, as on the command line of a training."""


class Part(Settings):
    """What both tasks have."""

    protocol: str
    """A shipped protocol's name, or a file."""
    dataset_dir: str
    methods: dict[str, Method] = Field(min_length=1)
    """By the names of their folders and of the table's rows."""
    settings: tuple[str, ...] = ()
    """Of all the trainings; a method's own count more."""
    checkpoint: PositiveInt | None = None
    """Draw from the checkpoint of this step; null: from the last one."""
    also_checkpoints: tuple[PositiveInt, ...] = ()
    """Draw and score those of these steps, too: how fast a method learns. The table does not show them."""
    judges: dict[str, str] = Field(default_factory=dict)
    """Where judges' weights are, other than the protocol says: a file, a folder or a hub name."""
    batch_size: PositiveInt = 8
    """Images at a time, in drawing and scoring. The last bits of images may depend on it."""

    @field_validator("methods")
    @classmethod
    def _folder_names(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name in methods:
            if not re.fullmatch(NAME, name) or set(name) == {"."}:
                raise ValueError(f"{name!r}: expected a name for a folder, of letters, digits and _ . + -")
        return methods


class SubjectPart(Part):
    """Subject-driven generation: a training for each method and subject."""

    dataset_dir: str
    """Holds SUBJECT/ with photos, and maybe the data set's `prompts_and_classes.txt`, which must then say what the
    protocol says; `builtin:` for the miniature's subjects."""
    subjects: tuple[str, ...] | None = None
    """Of the protocol; null: all of them."""


class MapPart(Part):
    """Semantic maps to images: one training for each method."""

    dataset_dir: str
    """As `data.dataset_dir` of a training: it is trained on, and scored on the split that the protocol names."""
    captions: Path | None = None
    """Of the protocol's split: JSON lines or text files; null: what the data set has."""
    caption_template: str | None = None
    """For images of that split without a caption: "a photo of a {scene}"."""


class BenchmarkConfig(Settings):
    """A benchmark, of one task or both."""

    output_dir: Path
    device: str | None = None
    """To draw and to score on; null: cuda, else mps, else cpu."""
    threads: PositiveInt | None = None
    """CPU threads of each worker, on which the last bits of a training on the CPU may depend; null: as PyTorch sees
    fit, or OMP_NUM_THREADS."""
    dreambooth: SubjectPart | None = None
    controllable: MapPart | None = None

    @model_validator(mode="after")
    def _something(self) -> BenchmarkConfig:
        if self.dreambooth is None and self.controllable is None:
            raise ValueError("expected dreambooth, controllable, or both")
        return self


@dataclass(frozen=True)
class Unit:
    """What one worker does in one go: train, draw and score a method, on one subject where the task has subjects."""

    task: str
    method: str
    subject: str | None = None
    step: int | None = None
    """What is drawn and scored is the checkpoint of this step; None: what the benchmark's table is made of."""

    def __str__(self) -> str:
        step = None if self.step is None else f"step {self.step}"
        return "/".join(filter(None, (self.task, self.method, self.subject, step)))


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` shares of the units, counted from 1."""

    number: int = 1
    count: int = 1

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """The share's units, in the order in which they come.

        Methods may take times that are far apart, so that each share gets of every method as many subjects as any
        other, but for one: every `count`-th unit of all, counted method by method.
        """
        by_method = sorted(units, key=lambda unit: (unit.task, unit.method))
        share = set(by_method[self.number - 1 :: self.count])
        return [unit for unit in units if unit in share]


WHOLE = Shard()

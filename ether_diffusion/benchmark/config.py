"""Settings of a benchmark: which methods are trained on what, and the protocol that scores them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ether_diffusion.config import Settings, unquoted
from ether_diffusion.limits import Count, Steps, Workers

NAME = r"[\w.+-]+"


class Method(Settings):
    """A training config and changes to it."""

    config: str
    """A YAML file, or a shipped config's name, of the part's task."""
    settings: tuple[str, ...] = ()
    """`section.key=value`, as on the command line of a training."""


class Part(Settings):
    """Settings that both tasks have."""

    protocol: str
    """A shipped protocol's name, or a file."""
    dataset_dir: str
    methods: dict[str, Method] = Field(min_length=1)
    """By the names of their folders and of the table's rows."""
    settings: tuple[str, ...] = ()
    """For all trainings; a method's own settings override them."""
    checkpoint: Steps | None = None
    """Generate from the checkpoint of this step; null: from the end of the training."""
    also_checkpoints: tuple[Steps, ...] = ()
    """Steps whose checkpoints are generated from and scored as well: how fast a method learns. The table leaves them
    out."""
    judges: dict[str, str] = Field(default_factory=dict)
    """Sources of scorers' weights in the place of the protocol's: a file, a folder or a hub name."""
    batch_size: Workers = 8
    """Images at a time, in generation and scoring. The last bits of images may depend on it."""

    @field_validator("methods")
    @classmethod
    def _folder_names(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name in methods:
            if not re.fullmatch(NAME, name) or set(name) == {"."}:
                raise ValueError(f"{name!r}: expected a name for a folder, of letters, digits and _ . + -")
        return methods


class SubjectPart(Part):
    """Subject-driven generation: one training for each method and subject."""

    dataset_dir: str
    """Holds SUBJECT/ with photos. If the data set's `prompts_and_classes.txt` is there, it must agree with the
    protocol. `builtin:` for the miniature's subjects."""
    subjects: tuple[str, ...] | None = None
    """Of the protocol; null: all."""


class MapPart(Part):
    """Semantic maps to images: one training for each method."""

    dataset_dir: str
    """As `data.dataset_dir` of a training; scored on the split that the protocol names."""
    captions: Path | None = None
    """Of the protocol's split: JSON lines or text files; null: those of the data set."""
    caption_template: str | None = None
    """For images of that split without a caption: "a photo of a {scene}"."""


class BenchmarkConfig(Settings):
    """A benchmark of one task or both."""

    output_dir: Path
    device: str | None = None
    """For generation and scoring; null: cuda, else mps, else cpu."""
    threads: Workers | None = None
    """CPU threads of each worker; the last bits of a training on the CPU may depend on them. Null: OMP_NUM_THREADS, or
    PyTorch's default."""
    pack: Annotated[Literal["auto", "off"] | Count, unquoted("off")] = "auto"
    """Train units that differ in subject, seed or learning rate alone in shared passes: at most so many at once; auto:
    eight. Fewer, where they do not fit into memory. `off`: one by one."""
    dreambooth: SubjectPart | None = None
    controllable: MapPart | None = None

    @model_validator(mode="after")
    def _something(self) -> BenchmarkConfig:
        if self.dreambooth is None and self.controllable is None:
            raise ValueError("expected dreambooth, controllable, or both")
        return self


@dataclass(frozen=True)
class Unit:
    """The smallest share of a benchmark: a method's training, on one subject if the task has subjects, with its images
    and scores."""

    task: str
    method: str
    subject: str | None = None
    step: int | None = None
    """Generate from and score the checkpoint of this step; None: what the benchmark's table shows."""

    def __str__(self) -> str:
        step = None if self.step is None else f"step {self.step}"
        return "/".join(filter(None, (self.task, self.method, self.subject, step)))


Pack = tuple[Unit, ...]
"""Units whose trainings share passes."""

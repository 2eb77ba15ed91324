"""Scores of one's own subject: a run against the user's photos, with the prompts and scorers of a protocol.

The protocol is made for the subject, and so the numbers compare between runs on the same photos alone, never with the
tables of papers, which are means over thirty other subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import SavedRun, read_prompts, read_run
from ether_diffusion.models.bases import TINY

from .galleries import BUILTIN
from .metric_kinds import RANKING
from .protocols import SubjectEntry, SubjectProtocol, load_protocol
from .quick_look import templates_for
from .results import Results
from .run_scores import SubjectRunScores
from .subject_images import SubjectRun, generate_run

SOURCE, TINY_SOURCE = "dreambooth/subject-macro-v2", "tinyworld/dreambooth-v2"
"""The protocols whose scorers, sampler and prompts are taken."""
KINDS = ("object", "live")
LIVING = frozenset({
    "animal", "baby", "bear", "bird", "boy", "cat", "child", "cow", "deer", "dog", "duck", "elephant", "fish", "fox",
    "girl", "hamster", "horse", "kitten", "lion", "man", "monkey", "mouse", "owl", "panda", "parrot", "person", "pig",
    "puppy", "rabbit", "sheep", "tiger", "turtle", "wolf", "woman",
})  # fmt: skip
"""Words of classes that get the prompts of living subjects."""
NOTE = (
    "For runs on these photos alone: not comparable with the paper's tables, which are means over thirty other "
    "subjects."
)


@dataclass(frozen=True)
class OwnSubject:
    """A run, the photos of its subject, and the protocol that is made for them.

    Attributes:
        kind: Of the prompts: object, live, or the file that holds them.
    """

    run: SubjectRun
    protocol: SubjectProtocol
    kind: str


def own_subject(
    run: str | Path | SavedRun,
    photos: str,
    class_name: str | None = None,
    prompts: str | None = None,
    identifier: str | None = None,
) -> OwnSubject:
    """The subject of a run.

    Args:
        photos: A folder, or `builtin:SUBJECT`.
        class_name: Default: the one that the run was trained with.
        prompts: `object` or `live` for the protocol's 25 prompts of that kind, or a file with a prompt a line, in which
            `{subject}` stands for identifier and class. Default: by the class; on the miniature its ten prompts.
        identifier: Default: the run's, else the protocol's.

    Raises:
        UserError: no such run, photos or prompts; or the run does not state its class.
    """
    saved = run if isinstance(run, SavedRun) else read_run(run)
    find_photos(photos)
    is_tiny = saved.base_model == TINY
    source = load_protocol(SubjectProtocol, TINY_SOURCE if is_tiny else SOURCE)
    data = saved.config.get("data") or {}
    class_name = class_name or data.get("class_name")
    if not class_name:
        raise UserError(f"{saved.path} is not in a run folder whose config.yaml states its class; give --class.")
    kind, templates = _templates(source, photos, class_name, prompts)
    name = photos.removeprefix(BUILTIN) if photos.startswith(BUILTIN) else Path(photos).expanduser().resolve().name
    changed = {
        "name": f"own-subject/{kind if kind in KINDS else 'prompts'}-v1",
        "identifier": identifier or data.get("identifier") or source.identifier,
        "resolution": data.get("resolution") or source.resolution,
        "metrics": {key: metric for key, metric in source.metrics.items() if metric.kind not in RANKING},
        "subjects": {name: SubjectEntry(class_name=class_name, prompts=kind)},
        "prompts": {kind: templates},
        "look_alikes": None,
    }
    protocol = source.model_copy(update=changed)
    return OwnSubject(SubjectRun(saved, name, protocol.identifier, photos), protocol, kind)


def _templates(
    source: SubjectProtocol, photos: str, class_name: str, prompts: str | None
) -> tuple[str, tuple[str, ...]]:
    """The kind of prompts, and their templates."""
    if prompts is not None and prompts not in KINDS:
        lines = tuple(read_prompts(prompts))
        if bad := [line for line in lines if line.count("{subject}") != 1]:
            raise UserError(f"--prompts {prompts}: {bad[0]!r}; expected {{subject}} in it once, for word and class.")
        return "own", lines
    if prompts is None and source.base_model == TINY:
        return "miniature", tuple(templates_for(photos, class_name))
    is_living = not LIVING.isdisjoint(class_name.lower().split())
    kind = prompts or ("live" if is_living else "object")
    if kind not in source.prompts:
        raise UserError(f"--prompts {kind}: the miniature has its own prompts; leave it out, or give a file.")
    return kind, source.prompts[kind]


@dataclass(frozen=True, kw_only=True)
class OwnSubjectScores(SubjectRunScores):
    """Of runs and checkpoints of one's own subject."""

    subject: OwnSubject

    def of_runs(self, runs: Sequence[Path], output: Path) -> Results:
        if len(runs) != 1:
            raise UserError(f"--photos scores one run at a time, not {len(runs)}.")
        own = self.subject.run
        run = SubjectRun(read_run(runs[0]), own.subject, own.identifier, own.photos)
        options = {"batch_size": self.batch_size, "device": self.device}
        images = generate_run(self.protocol, run, output / "images", **options)
        return self._score([images], output, [run.subject])

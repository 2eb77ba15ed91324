"""The quick look at a run of the miniature: images before and after training, their scores, and a contact sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from ether_diffusion.data.other_worlds import pairs_note, photos_note
from ether_diffusion.data.pairs import Pair, find_pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import (
    ControllableSampling,
    Sampling,
    SavedRun,
    conditioned_rows,
    generate,
    generate_conditioned,
    load_pipeline,
    pair_sources,
)
from ether_diffusion.models.bases import TINY
from ether_diffusion.models.module_files import module_digest
from ether_diffusion.own_files import check_own, write_own
from ether_diffusion.pictures import save_sheets
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, evaluation_templates
from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scenes import SIZE
from ether_diffusion.tinyworld.scoring import load_scorers

from .quick_scores import (
    MapScores,
    SubjectScores,
    score_images,
    score_photos,
    score_scenes,
    table,
    without_identifier,
)
from .results import sampled_with

SAMPLING = Sampling(steps=20, guidance=4.0)
MAP_SAMPLING = ControllableSampling(steps=20, guidance=3.0)
IMAGES_PER_PROMPT = 2
CONTACT_SHEET, SCORES = "contact_sheet.png", "scores.json"
BUILTIN, SPLIT = "builtin:", "validation"
BATCH, MAP_BATCH, CELL = 10, 25, 128
COMPANIONS = ("a red ball", "a blue house", "a yellow star", "a white cat", "a green tree")

S = TypeVar("S", SubjectScores, MapScores)


@dataclass(frozen=True)
class Evaluation(Generic[S]):
    """The scores of a run.

    Attributes:
        before: Of the base alone, with the same prompts or captions, and seeds.
        after: Of the run.
        real: Of the real photos among themselves, or of the real pictures of the scenes.
        kind: What the real images are called: `photos` or `renders`.
        facts: What the scores depend on.
        heading: What was generated, and how.
        note: A reason to read the scores with care.
    """

    before: S
    after: S
    real: S
    kind: str
    contact_sheet: Path
    facts: Mapping[str, Any]
    heading: str
    note: str | None = None

    @property
    def columns(self) -> dict[str, S]:
        """The scores by the names of their columns."""
        return {"before": self.before, "after": self.after, self.kind: self.real}

    def table(self) -> str:
        """The table for a terminal, under what was generated and how: a protocol's images are of other settings."""
        return "\n".join([self.heading, table(self.columns), *([f"Note: {self.note}."] if self.note else [])])

    def save(self, path: Path) -> Evaluation[S]:
        """Write `scores.json`: facts, and scores to six digits; nan as null."""
        values = {
            name: {key: None if math.isnan(value) else round(value, 6) for key, value in asdict(scores).items()}
            for name, scores in self.columns.items()
        }
        write_own(path, json.dumps({**self.facts, "scores": values}, indent=1) + "\n")
        return self


def evaluate(
    run: SavedRun, output: str | Path, *, images_per_prompt: int = IMAGES_PER_PROMPT, seed: int = 0
) -> Evaluation[SubjectScores]:
    """Look at a subject-driven run. Images, `contact_sheet.png` and `scores.json` go into `output`; complete images are
    kept.

    Raises:
        UserError: the base is not `tiny`; or the run's config.yaml, which names the photos, is missing.
    """
    output = Path(output)
    _check_output(output)
    data = _data_settings(run, run.trained.folder, "instance_dir", "identifier", "class_name")
    photos = [photo.open() for photo in find_photos(data["instance_dir"]).photos]
    prompts = prompts_for(data["instance_dir"], data["identifier"], data["class_name"])
    plain = [without_identifier(prompt, data["identifier"]) for prompt in prompts for _ in range(images_per_prompt)]
    scorers = load_scorers()
    options: dict[str, Any] = {"images_per_prompt": images_per_prompt, "seed": seed}
    images = {}
    for name, source in (("before", None), ("after", run)):
        pipeline, found = load_pipeline(source, base_model=TINY)
        record = {"base_model": TINY, "adapter": found.digest if found else None}
        sampling: dict[str, Any] = {"sampling": SAMPLING, "batch_size": BATCH}
        images[name] = _opened(generate(pipeline, prompts, output / name, **options, **sampling, record=record).files)
    rows = [(f"the photos: {data['instance_dir']}", photos)]
    rows += [(f"{name} training: {'; '.join(prompts)}", found[::images_per_prompt]) for name, found in images.items()]
    before, after = (score_images(scorers, photos, found, plain) for found in images.values())
    page = save_sheets(rows, output / CONTACT_SHEET, CELL, own=True)[0]
    facts: dict[str, Any] = {
        "adapter": run.trained.digest,
        "prompts": prompts,
        **options,
        "sampling": SAMPLING.model_dump(),
    }
    heading = (
        f"{len(prompts)} prompts, {images_per_prompt} images of each: {sampled_with({**facts, **facts['sampling']})}"
    )
    note = photos_note(data["instance_dir"], [photo.size for photo in photos], data["class_name"])
    real = score_photos(scorers, photos)
    return Evaluation(before, after, real, "photos", page, facts, heading, note).save(output / SCORES)


def evaluate_maps(
    run: SavedRun, output: str | Path, *, scenes: int = 100, seed: int = 0, split: str = SPLIT
) -> Evaluation[MapScores]:
    """Look at a controllable run. Writes what `evaluate` writes.

    Args:
        scenes: How many scenes of the data set's split, the first ones; at least 2.

    Raises:
        UserError: the base is not `tiny`; the run's config.yaml, which names the scenes, is missing; or the run was
            not trained on label maps of the miniature.
    """
    output = Path(output)
    _check_output(output)
    data = _data_settings(run, run.path, "dataset_dir")
    if run.condition_encoder is None:
        raise UserError(f"evaluate: {run.path} has no condition encoder; expected a run of controllable training.")
    try:
        pairs = find_pairs(data["dataset_dir"], split=split, condition=data.get("condition", "auto"), limit=scenes)
    except UserError as error:
        hint = " --split names another split." if "split" in str(error) else ""
        raise UserError(f"evaluate: {error}{hint}") from None
    if pairs.kind != "labels" or pairs.names != LABELS[1:]:
        raise UserError(f"evaluate: {pairs.folder} has no label maps of the miniature; its scorers know no others.")
    digests = {"condition_encoder": module_digest(run.condition_encoder)}
    digests |= {"adapter": run.adapter.digest} if run.adapter else {}
    labels, scorers = np.stack([_labels(pair) for pair in pairs.pairs]), load_scorers()
    sources, files = pair_sources(pairs, SIZE), {}
    options: dict[str, Any] = {"seed": seed, "sampling": MAP_SAMPLING, "batch_size": MAP_BATCH}
    for name, source, made_by in (("before", None, {}), ("after", run, digests)):
        pipeline: Any = load_pipeline(source, base_model=TINY, takes_conditions=True)[0]
        record = {"base_model": TINY, **made_by}
        files[name] = generate_conditioned(pipeline, sources, output / name, **options, record=record).files
    before, after = (score_scenes(scorers, _opened(found), labels) for found in files.values())
    columns = [(f"{name} training", found) for name, found in files.items()]
    page = save_sheets(conditioned_rows(sources, columns), output / CONTACT_SHEET, CELL, own=True)[0]
    real = score_scenes(scorers, _opened([pair.image for pair in pairs.pairs if pair.image is not None]), labels)
    facts: dict[str, Any] = {"scenes": len(pairs), "seed": seed, **digests, "sampling": MAP_SAMPLING.model_dump()}
    facts |= {"split": split} if split != SPLIT else {}
    heading = f"{len(pairs)} scenes of split {split!r}: {sampled_with({**facts, **facts['sampling']})}"
    return Evaluation(before, after, real, "renders", page, facts, heading, pairs_note(pairs)).save(output / SCORES)


def prompts_for(instance_dir: str, identifier: str, class_name: str) -> list[str]:
    """Ten evaluation prompts with the identifier."""
    templates = templates_for(instance_dir, class_name)
    return [template.format(subject=f"{identifier} {class_name}") for template in templates]


def templates_for(instance_dir: str, class_name: str) -> Sequence[str]:
    """Their templates, with `{subject}`: a built-in subject's own, or the same for any class of the world."""
    name = instance_dir.removeprefix(BUILTIN)
    if instance_dir.startswith(BUILTIN) and name in SUBJECTS:
        return SUBJECTS[name].templates
    return evaluation_templates([thing for thing in COMPANIONS if not thing.endswith(class_name)][:4])


def _check_output(output: Path) -> None:
    """Raise UserError, before images are generated, for files that are not ours."""
    check_own(output / CONTACT_SHEET, output / SCORES)


def _data_settings(run: SavedRun, folder: Path, *keys: str) -> dict[str, Any]:
    """The `data` section of the run's config, which must have these keys."""
    if run.base_model != TINY:
        raise UserError(
            f"evaluate: {folder} was trained on {run.base_model}; the scorers know images of base '{TINY}' only."
        )
    data = run.config.get("data") or {}
    if missing := [key for key in keys if not data.get(key)]:
        raise UserError(f"evaluate: {folder} is not in a run folder: no config.yaml that states 'data.{missing[0]}'.")
    return data


def _opened(files: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def _labels(pair: Pair) -> np.ndarray:
    assert pair.condition is not None
    return np.asarray(Image.open(pair.condition))

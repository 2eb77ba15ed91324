"""Scores a run of the miniature: draws its subject's prompts before and after training, and asks the judges."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.generation import Sampling, generate, load_pipeline, read_run
from ether_diffusion.models.bases import TINY
from ether_diffusion.pictures import save_png, sheet
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, evaluation_templates
from ether_diffusion.tinyworld.scoring import load_scorers

from .quick_scores import SubjectScores, ceiling, score, table, without_identifier

SAMPLING = Sampling(steps=20, guidance=4.0)
IMAGES_PER_PROMPT = 2
BUILTIN = "builtin:"
CELL = 128
COMPANIONS = ("a red ball", "a blue house", "a yellow star", "a white cat", "a green tree")


@dataclass(frozen=True)
class Evaluation:
    """What a run was worth.

    Attributes:
        before: The base alone, from the same prompts and seeds.
        after: With the adapter.
        photos: The real photos among themselves.
    """

    before: SubjectScores
    after: SubjectScores
    photos: SubjectScores
    contact_sheet: Path

    def table(self) -> str:
        """For a terminal."""
        return table({"before": self.before, "after": self.after, "photos": self.photos})


def evaluate(
    adapter: str | Path, output: str | Path, *, images_per_prompt: int = IMAGES_PER_PROMPT, seed: int = 0
) -> Evaluation:
    """Draw and score; images, `contact_sheet.png` and `scores.json` go into `output`. Complete images are kept.

    Raises:
        UserError: the adapter's base is not `tiny`, whose pictures alone the judges know; or its run folder does not
            say which photos it was trained on.
    """
    run, output = read_run(adapter), Path(output)
    saved, folder = run.trained, run.trained.folder
    if saved.base_model != TINY:
        raise UserError(
            f"evaluate: {folder} was trained on {saved.base_model}; the judges know pictures of base '{TINY}' alone."
        )
    data: dict[str, Any] = run.config.get("data", {})
    if not data.get("instance_dir"):
        raise UserError(f"evaluate: {folder} lies in no run folder, whose config.yaml names the photos of the subject.")
    photos = [photo.open() for photo in find_photos(data["instance_dir"]).photos]
    prompts = prompts_for(data["instance_dir"], data["identifier"], data["class_name"])
    plain = [without_identifier(prompt, data["identifier"]) for prompt in prompts for _ in range(images_per_prompt)]

    judges, scores, rows = load_scorers(), {}, [(f"the photos: {data['instance_dir']}", photos)]
    for name, source in (("before", None), ("after", folder)):
        pipeline, found = load_pipeline(source, base_model=TINY)
        record = {"base_model": TINY, "adapter": found.digest if found else None}
        files = generate(
            pipeline,
            prompts,
            output / name,
            images_per_prompt=images_per_prompt,
            seed=seed,
            sampling=SAMPLING,
            batch_size=10,
            record=record,
        )
        images = [Image.open(file).convert("RGB") for file in files]
        scores[name] = score(judges, photos, images, plain)
        firsts = images[::images_per_prompt]
        rows.append((f"{name} training: {'; '.join(prompts)}", firsts))
    contact_sheet = save_png(sheet(rows, CELL), output / "contact_sheet.png")
    evaluation = Evaluation(scores["before"], scores["after"], ceiling(judges, photos), contact_sheet)
    _write(output / "scores.json", evaluation, prompts, saved.digest, images_per_prompt, seed)
    return evaluation


def prompts_for(instance_dir: str, identifier: str, class_name: str) -> list[str]:
    """Ten evaluation prompts with the identifier: a built-in subject's own, or the same for any class of the world."""
    name = instance_dir.removeprefix(BUILTIN)
    if instance_dir.startswith(BUILTIN) and name in SUBJECTS:
        templates: Sequence[str] = SUBJECTS[name].templates
    else:
        templates = evaluation_templates([thing for thing in COMPANIONS if not thing.endswith(class_name)][:4])
    return [template.format(subject=f"{identifier} {class_name}") for template in templates]


def _write(
    path: Path, evaluation: Evaluation, prompts: list[str], digest: str, images_per_prompt: int, seed: int
) -> None:
    columns = {name: getattr(evaluation, name) for name in ("before", "after", "photos")}
    values = {
        name: {key: None if math.isnan(value) else round(value, 6) for key, value in asdict(scores).items()}
        for name, scores in columns.items()
    }
    facts = {"adapter": digest, "prompts": prompts, "images_per_prompt": images_per_prompt, "seed": seed}
    write_whole(path, json.dumps({**facts, "sampling": SAMPLING.model_dump(), "scores": values}, indent=1) + "\n")

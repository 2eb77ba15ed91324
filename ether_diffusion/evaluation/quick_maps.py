"""Scores a controllable run of the miniature: draws scenes under their maps, and asks the segmenter what it sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.data.pairs import Pair, find_pairs
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.generation import (
    ControllableSampling,
    SavedRun,
    conditioned_sheet,
    generate_conditioned,
    load_pipeline,
    pair_sources,
)
from ether_diffusion.metrics.segmentation import SegmentationScore
from ether_diffusion.models.bases import TINY, load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder, condition_encoder_digest
from ether_diffusion.models.controllable_pipeline import ControllablePipeline, controllable_pipeline
from ether_diffusion.models.controlnet import ConditionedPipeline
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scenes import SIZE
from ether_diffusion.tinyworld.scoring import Scorers, load_scorers

from .results import aligned

SAMPLING = ControllableSampling(steps=20, guidance=3.0)
SPLIT, BATCH, CELL = "validation", 25, 128


@dataclass(frozen=True)
class MapScores:
    """Of one set of pictures.

    Attributes:
        miou: Over the whole set and the classes that occur, of the segmenter's maps and those drawn under.
        pixel_accuracy: Share of the labelled pixels.
        shuffled: mIoU with the maps of other scenes, each scene's with that of the one half the set further: what
            following captions alone would give.
    """

    miou: float
    pixel_accuracy: float
    shuffled: float


TITLES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "shuffled": "mIoU with other scenes' maps"}


@dataclass(frozen=True)
class MapEvaluation:
    """What a run was worth.

    Attributes:
        before: The base alone, from the same captions and seeds.
        after: Under the maps, with encoder and adapter.
        renders: The real pictures: the segmenter's own limit.
    """

    before: MapScores
    after: MapScores
    renders: MapScores
    contact_sheet: Path

    def table(self) -> str:
        """For a terminal."""
        columns = {name: asdict(getattr(self, name)) for name in ("before", "after", "renders")}
        rows = [(title, *(f"{column[key]:.3f}" for column in columns.values())) for key, title in TITLES.items()]
        return aligned([("", *columns), *rows])


def evaluate_maps(run: SavedRun, output: str | Path, *, scenes: int = 100, seed: int = 0) -> MapEvaluation:
    """Draw and score; images, `contact_sheet.png` and `scores.json` go into `output`. Complete images are kept.

    Args:
        scenes: How many of the data set's validation scenes, the first ones; at least 2.

    Raises:
        UserError: the base is not `tiny`, or the run was not trained on label maps of the miniature.
    """
    output = Path(output)
    data = run.config.get("data", {})
    if run.base_model != TINY:
        raise UserError(f"evaluate: {run.path} was trained on {run.base_model}; the judges know base '{TINY}' alone.")
    if run.condition_encoder is None or not data.get("dataset_dir"):
        raise UserError(f"evaluate: {run.path} lies in no run folder, whose config.yaml names the scenes.")
    pairs = find_pairs(data["dataset_dir"], split=SPLIT, condition=data.get("condition", "auto"), limit=scenes)
    if pairs.kind != "labels" or pairs.names != LABELS[1:]:
        raise UserError(f"evaluate: {pairs.folder} has no label maps of the miniature, which alone the judges know.")
    truth = np.stack([_labels(pair) for pair in pairs.pairs])
    sources, judges = pair_sources(pairs, SIZE), load_scorers()
    scores, columns = {}, []
    for name in ("before", "after"):
        pipeline = _base() if name == "before" else load_pipeline(run.path)[0]
        record = {"base_model": TINY, **(_digests(run) if name == "after" else {})}
        assert isinstance(pipeline, ConditionedPipeline)
        files = generate_conditioned(
            pipeline, sources, output / name, seed=seed, sampling=SAMPLING, batch_size=BATCH, record=record
        )
        scores[name] = score(judges, [Image.open(file).convert("RGB") for file in files], truth)
        columns.append((f"{name} training", files))
    renders = [Image.open(pair.image).convert("RGB") for pair in pairs.pairs if pair.image is not None]
    contact_sheet = save_png(conditioned_sheet(sources, columns, CELL), output / "contact_sheet.png")
    evaluation = MapEvaluation(**scores, renders=score(judges, renders, truth), contact_sheet=contact_sheet)
    _write(output / "scores.json", evaluation, {"scenes": len(pairs), "seed": seed, **_digests(run)})
    return evaluation


def score(judges: Scorers, images: Sequence[Image.Image], labels: np.ndarray) -> MapScores:
    """Scores of pictures against maps (B, 64, 64), 0 being unlabelled."""
    seen = judges.segment(images)
    own, other = (
        SegmentationScore(len(LABELS) - 1).update(seen, maps).compute()
        for maps in (labels, np.roll(labels, len(labels) // 2, axis=0))
    )
    return MapScores(own["miou"], own["pixel_accuracy"], other["miou"])


def _base() -> ControllablePipeline:
    """The base alone: an encoder that was not trained adds nothing."""
    base = load_base(TINY)
    return controllable_pipeline(base, build_condition_encoder(base.unet, base.vae_factor))


def _labels(pair: Pair) -> np.ndarray:
    assert pair.condition is not None
    return np.asarray(Image.open(pair.condition))


def _digests(run: SavedRun) -> dict[str, str]:
    assert run.condition_encoder is not None
    adapter = {"adapter": run.adapter.digest} if run.adapter else {}
    return {"condition_encoder": condition_encoder_digest(run.condition_encoder), **adapter}


def _write(path: Path, evaluation: MapEvaluation, facts: dict[str, object]) -> None:
    names = ("before", "after", "renders")
    values = {name: {k: round(v, 6) for k, v in asdict(getattr(evaluation, name)).items()} for name in names}
    write_whole(path, json.dumps({**facts, "sampling": SAMPLING.model_dump(), "scores": values}, indent=1) + "\n")

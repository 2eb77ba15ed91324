"""Scores of subjects under a protocol: images and photos -> values of pairs -> averages with intervals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import ClipTextScore, LpipsDiversity, LpipsScore
from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.metrics.similarity import ImageSimilarity

from .averages import clusters_of, estimate, per_prompt, per_subject
from .ceilings import ceilings_of, features_of, photo_pairs
from .data_digests import photos_digest
from .image_records import faults, is_black, open_image, pixel_digest, unrecorded
from .protocols import SubjectProtocol
from .results import MetricRecord, Results, provenance
from .scorers import Loaded
from .subject_images import SubjectImages


@dataclass(frozen=True)
class SubjectPairs:
    """The scores of one subject.

    Attributes:
        pairs: By metric; rows are keys of generated images.
        ceilings: By metric, of the photos among themselves; empty for a single photo.
        prompt_of: The template of each key.
        digests: Of the pixels of the images that are not black.
        black: How many images are black.
        photos: Digest of the photos.
    """

    subject: str
    pairs: Mapping[str, Pairs]
    ceilings: Mapping[str, Pairs]
    prompt_of: Mapping[str, str]
    digests: tuple[str, ...]
    black: int
    photos: str


def score_subject(
    found: SubjectImages, protocol: SubjectProtocol, scorers: Mapping[str, Loaded], batch_size: int = 32
) -> SubjectPairs:
    """Score one subject. Its images are held in memory; each passes each network once.

    Raises:
        UserError: an image cannot be read or is not of the protocol's size; or the subject has no images.
    """
    photos = {photo.name: photo.open() for photo in found.photos}
    images, prompt_of = _opened(found, protocol)
    if not images:
        raise UserError(f"{found.name}: none of its images is there.")
    of_photos, of_images = (features_of(scorers, shown, batch_size) for shown in (photos, images))
    pairs: dict[str, Pairs] = {}
    for name, metric in protocol.metrics.items():
        network = scorers[metric.judge].network
        if metric.kind == "similarity":
            score = ImageSimilarity(network)
            score.update_features(of_photos(metric.judge), list(photos), subject=found.name, real=True)
            score.update_features(of_images(metric.judge), list(images), subject=found.name, real=False)
        elif metric.kind == "text":
            word = found.identifier if metric.identifier else ""
            texts = [protocol.prompt(found.name, prompt_of[key], word) for key in images]
            score = ClipTextScore(network)
            score.update_features(of_images(metric.judge), texts, list(images), subject=found.name)
        elif metric.kind == "distance":
            score = LpipsScore(network)
            score.update(*_named(images), *_named(photos), subject=found.name)
        else:
            score = LpipsDiversity(network)
            for template in dict.fromkeys(prompt_of.values()):
                alike = {key: image for key, image in images.items() if prompt_of[key] == template}
                if len(alike) > 1:
                    score.update(*_named(alike), group=found.name)
        if found.name in (values := score.pairs()):
            pairs[name] = values[found.name]
    return SubjectPairs(
        found.name,
        pairs,
        photo_pairs(found.name, photos, protocol, scorers, of_photos),
        prompt_of,
        tuple(pixel_digest(image) for image in images.values() if not is_black(image)),
        sum(map(is_black, images.values())),
        photos_digest(found.photos),
    )


def subject_results(
    protocol: SubjectProtocol,
    scored: Iterable[SubjectPairs],
    scorers: Mapping[str, Loaded],
    run: dict[str, Any],
    asked: Collection[str] | None = None,
) -> Results:
    """Averages and intervals over subjects, in any order.

    Args:
        run: What is evaluated, as `recorded_settings` gives it.
        asked: The subjects whose images are expected. Those without a score count as missing. Default: all of the
            protocol's.

    Raises:
        UserError: no subjects, or one twice.
    """
    subjects = sorted(scored, key=lambda one: one.subject)
    names = [one.subject for one in subjects]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{protocol.name}: subjects {', '.join(names) or '(none)'}; expected at least one, each once.")
    metrics = {}
    for name, metric in protocol.metrics.items():
        clusters = {one.subject: clusters_of(one.pairs[name], one.prompt_of) for one in subjects if name in one.pairs}
        if clusters:
            interval = estimate(clusters, protocol.averaging, protocol.bootstrap).interval(metric.bounds)
            metrics[name] = MetricRecord(
                **vars(interval),
                higher_is_better=metric.higher_is_better,
                per_subject=per_subject(clusters),
                per_prompt=per_prompt(clusters, protocol.averaging),
            )
    ceilings, ceilings_per_subject = ceilings_of({one.subject: one.ceilings for one in subjects}, protocol.averaging)
    wanted = {*names, *(protocol.subjects if asked is None else asked)}
    expected = sum(len(protocol.templates(name)) for name in wanted) * protocol.images_per_prompt
    images, black = sum(len(one.prompt_of) for one in subjects), sum(one.black for one in subjects)
    return Results(
        **provenance(protocol, scorers),
        run={**run, **unrecorded(protocol, run)},
        data={f"photos of {one.subject}": one.photos for one in subjects},
        counts={
            "subjects": len(subjects),
            "prompts": sum(len(protocol.templates(name)) for name in names),
            **faults(expected, images, black, (digest for one in subjects for digest in one.digests)),
        },
        absent_subjects=[name for name in protocol.subjects if name not in names],
        metrics=metrics,
        ceilings=ceilings,
        ceilings_per_subject=ceilings_per_subject,
    )


def _opened(found: SubjectImages, protocol: SubjectProtocol) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Images and templates by a key that sorts by template."""
    images, prompt_of = {}, {}
    for number, (template, files) in enumerate(found.files.items()):
        for file in files:
            key = f"{number:02d}/{file.relative_to(found.folder).as_posix()}"
            images[key], prompt_of[key] = open_image(file, protocol), template
    return images, prompt_of


def _named(images: Mapping[str, Image.Image]) -> tuple[list[Image.Image], list[str]]:
    return list(images.values()), list(images)

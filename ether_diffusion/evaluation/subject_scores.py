"""Scores of subjects under a protocol: images and photos -> values of pairs -> averages with intervals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.metrics import ClipTextScore, LpipsDiversity, LpipsScore
from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.metrics.similarity import ImageSimilarity

from .averages import average, clusters_of, interval, per_prompt, per_subject
from .ceilings import ceilings_of, in_batches_of, photo_pairs
from .data_digests import photos_digest
from .image_lists import unrecorded
from .protocols import SubjectProtocol
from .results import MetricRecord, Results, ScorerRecord, versions
from .scorers import Loaded
from .subject_images import SubjectImages, duplicates, is_black, pixel_digest


@dataclass(frozen=True)
class SubjectPairs:
    """What the judges say of one subject.

    Attributes:
        pairs: By metric; rows are keys of generated images.
        ceilings: By metric, of photos among themselves; none of a single photo.
        prompt_of: The template of each key.
        digests: Of the pixels of the images that are not black.
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
    found: SubjectImages, protocol: SubjectProtocol, judges: Mapping[str, Loaded], batch_size: int = 32
) -> SubjectPairs:
    """Ask the judges of one subject. Its images are held; each passes a network once.

    Raises:
        UserError: an image cannot be read or is not of the protocol's size; or the subject has no images at all.
    """
    photos = {photo.name: photo.open() for photo in found.photos}
    images, prompt_of = _opened(found, protocol)
    if not images:
        raise UserError(f"{found.name}: none of its images is there.")
    of_photos, of_images = (in_batches_of(judges, list(shown.values()), batch_size) for shown in (photos, images))
    pairs: dict[str, Pairs] = {}
    for name, metric in protocol.metrics.items():
        network = judges[metric.judge].network
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
        photo_pairs(found.name, photos, protocol, judges, of_photos),
        prompt_of,
        tuple(pixel_digest(image) for image in images.values() if not is_black(image)),
        sum(map(is_black, images.values())),
        photos_digest(found.photos),
    )


def subject_results(
    protocol: SubjectProtocol,
    scored: Iterable[SubjectPairs],
    judges: Mapping[str, Loaded],
    run: dict[str, Any],
    asked: Collection[str] | None = None,
) -> Results:
    """Averages and intervals over subjects, whatever their order.

    Args:
        run: What was evaluated, as `told_of` says it.
        asked: The subjects whose images were asked for, as the run of a single one asks for its own alone. Images of
            those that are not among the scored count as missing. Default: all of the protocol's.

    Raises:
        UserError: no subjects, or one twice.
    """
    subjects = sorted(scored, key=lambda one: one.subject)
    names = [one.subject for one in subjects]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{protocol.name}: subjects {', '.join(names) or '(none)'}; expected at least one, each once.")
    metrics = {}
    for name, metric in protocol.metrics.items():
        by_subject = {one.subject: clusters_of(one.pairs[name], one.prompt_of) for one in subjects if name in one.pairs}
        if by_subject:
            low, high = interval(by_subject, protocol.averaging, protocol.bootstrap, metric.bounds)
            metrics[name] = MetricRecord(
                value=average(by_subject, protocol.averaging),
                low=low,
                high=high,
                higher_is_better=metric.higher_is_better,
                per_subject=per_subject(by_subject),
                per_prompt=per_prompt(by_subject, protocol.averaging),
            )
    ceilings, ceilings_per_subject = ceilings_of({one.subject: one.ceilings for one in subjects}, protocol.averaging)
    images, wanted = sum(len(one.prompt_of) for one in subjects), protocol.subjects if asked is None else asked
    expected = sum(len(protocol.templates(name)) for name in {*names, *wanted}) * protocol.images_per_prompt
    counts = {
        "subjects": len(subjects),
        "prompts": sum(len(protocol.templates(name)) for name in names),
        "images": images,
        "expected": expected,
        "black": sum(one.black for one in subjects),
        "missing": expected - images,
        "duplicate": duplicates(digest for one in subjects for digest in one.digests),
    }
    return Results(
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        run={**run, **unrecorded(protocol, run)},
        data={f"photos of {one.subject}": one.photos for one in subjects},
        judges={name: ScorerRecord(source=judge.source, sha256=judge.sha256) for name, judge in judges.items()},
        versions=versions(),
        counts=counts,
        absent_subjects=[name for name in protocol.subjects if name not in names],
        metrics=metrics,
        ceilings=ceilings,
        ceilings_per_subject=ceilings_per_subject,
    )


def _opened(found: SubjectImages, protocol: SubjectProtocol) -> tuple[dict[str, Image.Image], dict[str, str]]:
    images, prompt_of = {}, {}
    for number, (template, files) in enumerate(found.drawn.items()):
        for file in files:
            key = f"{number:02d}/{file.relative_to(found.folder).as_posix()}"
            image = open_photo(file)
            if image.size != (protocol.resolution, protocol.resolution):
                side = protocol.resolution
                raise UserError(f"{file}: {image.width} x {image.height}; {protocol.name} has {side} x {side}.")
            images[key], prompt_of[key] = image, template
    return images, prompt_of


def _named(images: Mapping[str, Image.Image]) -> tuple[list[Image.Image], list[str]]:
    return list(images.values()), list(images)

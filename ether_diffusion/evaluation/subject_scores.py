"""Scores of subjects under a protocol: images and photos -> values of pairs -> averages with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.metrics import ClipTextScore, LpipsDiversity, LpipsScore
from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.metrics.similarity import ImageSimilarity

from .averages import average, clusters_of, interval, per_prompt, per_subject
from .image_lists import not_told
from .judges import Loaded
from .protocols import SubjectProtocol
from .results import JudgeRecord, MetricRecord, Results, versions
from .subject_images import SubjectImages, duplicates, is_black, pixel_digest

CEILINGS = ("similarity", "distance")


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
    expected: int
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
    features: dict[tuple[str, bool], Any] = {}

    def seen_by(judge: str, *, real: bool) -> Any:
        if (judge, real) not in features:
            shown = list((photos if real else images).values())
            network = judges[judge].network
            features[judge, real] = _in_batches(network, shown, batch_size)
        return features[judge, real]

    pairs, ceilings = {}, {}
    for name, metric in protocol.metrics.items():
        network = judges[metric.judge].network
        if metric.kind == "similarity":
            score = ImageSimilarity(network)
            score.update_features(seen_by(metric.judge, real=True), list(photos), subject=found.name, real=True)
            score.update_features(seen_by(metric.judge, real=False), list(images), subject=found.name, real=False)
            ceilings[name] = score.real_pairs()[found.name]
        elif metric.kind == "text":
            word = found.identifier if metric.identifier else ""
            texts = [protocol.prompt(found.name, prompt_of[key], word) for key in images]
            score = ClipTextScore(network)
            score.update_features(seen_by(metric.judge, real=False), texts, list(images), subject=found.name)
        elif metric.kind == "distance":
            score = LpipsScore(network)
            score.update(*_named(images), *_named(photos), subject=found.name)
            if len(photos) > 1:
                ceilings[name] = LpipsDiversity(network).update(*_named(photos), group=found.name).pairs()[found.name]
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
        {name: ceiling for name, ceiling in ceilings.items() if ceiling.counted.any()},
        prompt_of,
        tuple(pixel_digest(image) for image in images.values() if not is_black(image)),
        sum(map(is_black, images.values())),
        len(protocol.templates(found.name)) * protocol.images_per_prompt,
        hashlib.sha256(" ".join(photo.digest for photo in found.photos).encode()).hexdigest(),
    )


def subject_results(
    protocol: SubjectProtocol, scored: Iterable[SubjectPairs], judges: Mapping[str, Loaded], run: dict[str, Any]
) -> Results:
    """Averages and intervals over subjects, whatever their order.

    Args:
        run: What was evaluated, as `told_of` says it.

    Raises:
        UserError: no subjects, or one twice.
    """
    subjects = sorted(scored, key=lambda one: one.subject)
    names = [one.subject for one in subjects]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{protocol.name}: subjects {', '.join(names) or '(none)'}; expected at least one, each once.")
    metrics, ceilings = {}, {}
    for name, metric in protocol.metrics.items():
        by_subject = {one.subject: clusters_of(one.pairs[name], one.prompt_of) for one in subjects if name in one.pairs}
        if by_subject:
            low, high = interval(by_subject, protocol.averaging, protocol.bootstrap)
            metrics[name] = MetricRecord(
                value=average(by_subject, protocol.averaging),
                low=low,
                high=high,
                higher_is_better=metric.higher_is_better,
                per_subject=per_subject(by_subject),
                per_prompt=per_prompt(by_subject, protocol.averaging),
            )
        real = {one.subject: {"": _whole(one.ceilings[name])} for one in subjects if name in one.ceilings}
        if real:
            ceilings[name] = average(real, protocol.averaging)
    images, expected = sum(len(one.prompt_of) for one in subjects), sum(one.expected for one in subjects)
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
        run={**run, **not_told(protocol, run)},
        data={f"photos of {one.subject}": one.photos for one in subjects},
        judges={name: JudgeRecord(source=judge.source, sha256=judge.sha256) for name, judge in judges.items()},
        versions=versions(),
        counts=counts,
        metrics=metrics,
        ceilings=ceilings,
    )


def _opened(found: SubjectImages, protocol: SubjectProtocol) -> tuple[dict[str, Image.Image], dict[str, str]]:
    images, prompt_of = {}, {}
    for number, (template, files) in enumerate(found.drawn.items()):
        for file in files:
            key = f"{number:02d}/{file.name}"
            image = open_photo(file)
            if image.size != (protocol.resolution, protocol.resolution):
                side = protocol.resolution
                raise UserError(f"{file}: {image.width} x {image.height}; {protocol.name} has {side} x {side}.")
            images[key], prompt_of[key] = image, template
    return images, prompt_of


def _in_batches(network: Any, images: Sequence[Image.Image], batch_size: int) -> Any:
    starts = range(0, len(images), batch_size)
    return torch.cat([network.image_features(images[start : start + batch_size]) for start in starts])


def _named(images: Mapping[str, Image.Image]) -> tuple[list[Image.Image], list[str]]:
    return list(images.values()), list(images)


def _whole(pairs: Pairs) -> tuple[float, int]:
    return float(pairs.values[pairs.counted].sum()), int(pairs.counted.sum())

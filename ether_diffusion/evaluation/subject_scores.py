"""Scores of subjects under a protocol: images and photos -> values of pairs -> averages with intervals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ether_diffusion.data.data_digests import photos_digest
from ether_diffusion.errors import UserError
from ether_diffusion.metrics import ClipTextScore, LpipsDiversity, LpipsScore
from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.metrics.retrieval import retrieved
from ether_diffusion.metrics.similarity import ImageSimilarity
from ether_diffusion.pictures import pixel_digest

from .galleries import GalleryFeatures, gallery_digest, gallery_features
from .image_records import faults, is_black, open_image, unrecorded
from .intervals import Bootstrap, Estimate, subject_sample_sums
from .metric_kinds import RANKING
from .protocols import Averaging, SubjectProtocol
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
        gallery: Digest of the individuals that the images were to tell from the subject; "" without such a metric.
    """

    subject: str
    pairs: Mapping[str, Pairs]
    ceilings: Mapping[str, Pairs]
    prompt_of: Mapping[str, str]
    digests: tuple[str, ...]
    black: int
    photos: str
    gallery: str = ""


def score_subject(
    found: SubjectImages,
    protocol: SubjectProtocol,
    scorers: Mapping[str, Loaded],
    batch_size: int = 32,
    known: GalleryFeatures | None = None,
) -> SubjectPairs:
    """Score one subject. Its images are held in memory; each passes each network once.

    Args:
        known: The features of galleries, which subjects share; new ones are added.

    Raises:
        UserError: an image cannot be read or is not of the protocol's size; or the subject has no images.
    """
    photos = {photo.name: photo.open() for photo in found.photos}
    images, prompt_of = _opened(found, protocol)
    if not images:
        raise UserError(f"{found.name}: none of its images is there.")
    of_photos, of_images = (features_of(scorers, shown, batch_size) for shown in (photos, images))
    drift = {text: [open_image(file, protocol) for file in files] for text, files in found.drift.items()}
    known = {} if known is None else known
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
        elif metric.kind == "drift":
            if drift:
                pairs[name] = _drift(drift, network, batch_size)
            continue
        elif metric.kind == "retrieval" or metric.kind == "rank":  # not `in`: type checkers see these two kinds
            if found.gallery:
                others = gallery_features(found.gallery, scorers[metric.judge], known, batch_size)
                features = of_images(metric.judge), of_photos(metric.judge), others
                pairs[name] = retrieved(metric.kind, list(images), *features)
            continue
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
        gallery_digest(found.gallery) if found.gallery and protocol.has(*RANKING) else "",
    )


def _drift(images: Mapping[str, Sequence[Image.Image]], network: Any, batch_size: int) -> Pairs:
    """One minus the cosine of the two images of each prompt, before and after training."""
    shown = [image for before_and_after in images.values() for image in before_and_after]
    parts = [network.image_features(shown[k : k + batch_size]) for k in range(0, len(shown), batch_size)]
    before, after = F.normalize(torch.cat(parts).double()).unflatten(0, (-1, 2)).unbind(dim=1)
    values = 1 - (before * after).sum(dim=1, keepdim=True)
    return Pairs(tuple(images), ("before",), values, torch.ones_like(values, dtype=torch.bool))


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
        data={f"photos of {one.subject}": one.photos for one in subjects}
        | {f"gallery of {one.subject}": one.gallery for one in subjects if one.gallery},
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


Cluster = tuple[float, int]
"""The sum of the values of all pairs with images of one prompt, and the number of these pairs."""

Clusters = Mapping[str, Mapping[str, Cluster]]
"""By subject and prompt."""


def clusters_of(pairs: Pairs, prompt_of: Mapping[str, str]) -> dict[str, Cluster]:
    """The pairs of one subject, summed by the prompt of each row's image. Rows of drift are prompts themselves."""
    sums = pairs.values.where(pairs.counted, 0).sum(dim=1).tolist()
    counts = pairs.counted.sum(dim=1).tolist()
    found: dict[str, Cluster] = {}
    for row, total, count in zip(pairs.rows, sums, counts, strict=True):
        if count:
            prompt = prompt_of.get(row, row)
            before = found.get(prompt, (0.0, 0))
            found[prompt] = (before[0] + total, before[1] + count)
    return found


def average(clusters: Clusters, averaging: Averaging) -> float:
    """flat: the mean over all pairs. macro: the mean over subjects of the mean over each one's pairs."""
    totals = [_total(prompts) for _, prompts in sorted(clusters.items())]
    if averaging == "flat":
        return sum(total for total, _ in totals) / sum(count for _, count in totals)
    return sum(total / count for total, count in totals) / len(totals)


def per_subject(clusters: Clusters) -> dict[str, float]:
    """The mean over the pairs of each subject."""
    return {name: (total := _total(prompts))[0] / total[1] for name, prompts in sorted(clusters.items())}


def per_prompt(clusters: Clusters, averaging: Averaging) -> dict[str, float]:
    """The average over the images of each prompt alone, over the subjects that have it."""
    prompts = dict.fromkeys(prompt for _, found in sorted(clusters.items()) for prompt in found)

    def alone(prompt: str) -> Clusters:
        return {name: {prompt: found[prompt]} for name, found in clusters.items() if prompt in found}

    return {prompt: average(alone(prompt), averaging) for prompt in prompts}


def estimate(clusters: Clusters, averaging: Averaging, bootstrap: Bootstrap) -> Estimate:
    """The average, and the same on samples of subjects and prompts; all metrics of the same images share them."""
    tables = [[prompts[name] for name in sorted(prompts)] for _, prompts in sorted(clusters.items())]
    sums = subject_sample_sums([torch.tensor(table, dtype=torch.float64) for table in tables], bootstrap)
    if averaging == "flat":
        total = sums.sum(dim=1)
        replicas = total[:, 0] / total[:, 1]
    else:
        replicas = (sums[..., 0] / sums[..., 1]).mean(dim=1)
    return Estimate(average(clusters, averaging), replicas, bootstrap.level)


def _total(prompts: Mapping[str, Cluster]) -> Cluster:
    ordered = [cluster for _, cluster in sorted(prompts.items())]
    return sum(total for total, _ in ordered), sum(count for _, count in ordered)


def photo_pairs(
    subject: str,
    photos: Mapping[str, Image.Image],
    protocol: SubjectProtocol,
    scorers: Mapping[str, Loaded],
    features: Callable[[str], Any],
) -> dict[str, Pairs]:
    """All pairs of two photos, by metric that compares images. `features` gives the photos' features by scorer."""
    found, names = {}, list(photos)
    for name, metric in protocol.metrics.items():
        network = scorers[metric.judge].network
        if len(photos) < 2 or metric.kind not in ("similarity", "distance"):
            continue
        if metric.kind == "similarity":
            similarity = ImageSimilarity(network)
            similarity.update_features(features(metric.judge), names, subject=subject, real=True)
            found[name] = similarity.real_pairs()[subject]
        else:
            distances = LpipsDiversity(network).update(list(photos.values()), names, group=subject)
            found[name] = distances.pairs()[subject]
    return found


def ceilings_of(
    pairs: Mapping[str, Mapping[str, Pairs]], averaging: Averaging
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """By metric the average over subjects, and the value of each, from pairs by subject and metric."""
    mean, by_subject = {}, {}
    for name in dict.fromkeys(name for found in pairs.values() for name in found):
        sums = {subject: {"": _pair_sum(found[name])} for subject, found in pairs.items() if name in found}
        mean[name], by_subject[name] = average(sums, averaging), per_subject(sums)
    return mean, by_subject


def features_of(
    scorers: Mapping[str, Loaded], images: Mapping[str, Image.Image], batch_size: int
) -> Callable[[str], torch.Tensor]:
    """A function that gives the features of the images by scorer. Each image passes each network once."""
    known: dict[str, torch.Tensor] = {}
    shown = list(images.values())

    def features(scorer: str) -> torch.Tensor:
        if scorer not in known:
            network, starts = scorers[scorer].network, range(0, len(shown), batch_size)
            known[scorer] = torch.cat([network.image_features(shown[k : k + batch_size]) for k in starts])
        return known[scorer]

    return features


def _pair_sum(pairs: Pairs) -> tuple[float, int]:
    return float(pairs.values[pairs.counted].sum()), int(pairs.counted.sum())

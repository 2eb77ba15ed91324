"""Scores of images generated under label maps: agreement of a segmenter's maps with the truth, FID, KID and CMMD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.ahead import read_ahead
from ether_diffusion.data.data_digests import real_images_digest
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.errors import UserError
from ether_diffusion.files import Digest, digest_of_json
from ether_diffusion.metrics import InceptionDistance
from ether_diffusion.metrics.cmmd import clip_distance
from ether_diffusion.metrics.fid import frechet_distance, kernel_distance
from ether_diffusion.metrics.segmentation import class_counts, scores
from ether_diffusion.pictures import pixel_digest

from .image_records import faults, is_black, open_image, unrecorded
from .intervals import Bootstrap, Estimate, Interval, image_samples, jackknife_interval, sample_sums
from .map_images import MapImages, Scene, read_scene
from .metric_kinds import SetMetric
from .protocols import MapProtocol
from .results import MetricRecord, Results, per_class_counts, provenance
from .scorers import Loaded

DISTANCES = {"fid": frechet_distance, "kid": kernel_distance, "cmmd": clip_distance}


def score_maps(
    protocol: MapProtocol,
    pairs: Pairs,
    images: MapImages,
    scorers: Mapping[str, Loaded],
    run: dict[str, Any],
    batch_size: int = 4,
) -> Results:
    """Score all images that are present, and count those missing. Distances between distributions are to all real
    images.

    Args:
        run: What is evaluated, such as `MapImages.facts`.

    Raises:
        UserError: an image cannot be read or is not of the protocol's size; there is none; or a segmenter has another
            number of classes.
    """
    found = _scored(protocol, pairs, images, scorers, batch_size)
    if not found.names:
        raise UserError(f"{images.folder}: none of the images of {pairs.folder}, split {pairs.split}, is there.")
    metrics, ceilings = _metrics(protocol, found, pairs)
    return Results(
        **provenance(protocol, scorers),
        run={**run, **unrecorded(protocol, run)},
        data={
            f"maps of {pairs.split}": found.truth.hex(),
            f"images of {pairs.split}": real_images_digest(pairs),
            **_captions(images, pairs),
        },
        counts={
            "subjects": 0,
            "prompts": len(pairs),
            **faults(len(pairs), len(found.names), found.black, found.digests),
        },
        metrics=metrics,
        ceilings=ceilings,
        per_image={
            name: dict(zip(found.names, map(per_class_counts, torch.cat(counts)), strict=True))
            for name, counts in found.generated.items()
        },
    )


def check_segmenters(protocol: MapProtocol, scorers: Mapping[str, Loaded]) -> list[str]:
    """The names of the segmenters. Raises UserError for one with another number of classes than the protocol's."""
    agreements = [one for one in protocol.metrics.values() if one.kind != "distribution"]
    names = list(dict.fromkeys(one.judge for one in agreements))
    for name in names:
        classes = scorers[name].network.num_classes
        if classes != protocol.num_classes:
            raise UserError(f"scorer {name}: {classes} classes; {protocol.name} has {protocol.num_classes}.")
    return names


def segmentation_estimates(counts: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The numbers of `segmentation.scores` from (N, 3, C) `class_counts` of N images, and on samples of the images."""
    sums = sample_sums(counts, image_samples(len(counts), bootstrap))
    whole, samples = scores(*counts.sum(dim=0)), [scores(*one) for one in sums]
    return {
        name: Estimate(value, torch.tensor([one[name] for one in samples], dtype=torch.float64), bootstrap.level)
        for name, value in whole.items()
        if isinstance(value, float)
    }


@dataclass
class _Scored:
    """What scorers found in the images.

    Attributes:
        generated: By segmenter, batches of `class_counts` of generated images.
        real: The same of real images.
        distances: By network of a distance between distributions: the features of both.
        names: The scenes of the generated images.
        digests: Of the pixels of the generated images that are not black.
        truth: Of the names and labels of scenes. Not of pixels: those of a JPEG depend on the decoder.
    """

    generated: dict[str, list[Tensor]]
    real: dict[str, list[Tensor]]
    distances: dict[str, InceptionDistance]
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    black: int = 0
    truth: Digest = field(default_factory=Digest)


def _scored(
    protocol: MapProtocol, pairs: Pairs, images: MapImages, scorers: Mapping[str, Loaded], batch_size: int
) -> _Scored:
    segmenters = check_segmenters(protocol, scorers)
    networks = dict.fromkeys(one.judge for one in protocol.metrics.values() if one.kind == "distribution")
    distances = {name: InceptionDistance(scorers[name].network) for name in networks}
    found = _Scored({name: [] for name in segmenters}, {name: [] for name in segmenters}, distances)

    def read(start: int) -> tuple[list[Scene], list[Scene], list[Image.Image]]:
        scenes = [read_scene(pair, pairs, protocol.resolution) for pair in pairs.pairs[start : start + batch_size]]
        present = [scene for scene in scenes if scene.name in images.files]
        return scenes, present, [open_image(images.files[scene.name], protocol) for scene in present]

    for scenes, present, generated in read_ahead(read, range(0, len(pairs), batch_size)):
        for scene in scenes:
            found.truth.update(f"{scene.name} {scene.labels.shape} ", scene.labels.tobytes())
        kinds = (
            (True, [scene.image for scene in scenes], scenes, found.real),
            (False, generated, present, found.generated),
        )
        for real, shown, shown_scenes, counts in kinds:
            if not shown:
                continue
            labels = np.stack([scene.labels for scene in shown_scenes])
            for name in segmenters:
                maps = scorers[name].network(shown)
                counts[name].append(class_counts(maps, labels, protocol.num_classes))
            for distance in found.distances.values():
                distance.update(shown, [scene.name for scene in shown_scenes], real=real)
        found.names += [scene.name for scene in present]
        found.black += sum(map(is_black, generated))
        found.digests += [pixel_digest(image) for image in generated if not is_black(image)]
    return found


def _metrics(protocol: MapProtocol, found: _Scored, pairs: Pairs) -> tuple[dict[str, MetricRecord], dict[str, float]]:
    """The metrics, and those of the segmenters for the real images."""
    generated = {name: torch.cat(counts) for name, counts in found.generated.items()}
    real = {name: torch.cat(counts) for name, counts in found.real.items()}
    estimates = {name: segmentation_estimates(counts, protocol.bootstrap) for name, counts in generated.items()}
    whole, whole_real = ({n: scores(*c.sum(dim=0)) for n, c in counts.items()} for counts in (generated, real))
    metrics, ceilings = {}, {}
    for name, metric in protocol.metrics.items():
        parts: dict[str, Any] = {}
        if metric.kind == "segmentation":
            interval = estimates[metric.judge][metric.value].interval(metric.bounds)
            ceilings[name] = whole_real[metric.judge][metric.value]
            if metric.value == "miou":
                parts["per_class"] = _per_class(whole[metric.judge]["iou_per_class"], pairs)
                parts["absent_classes"] = whole[metric.judge]["absent_classes"]
        elif metric.kind == "shortfall":
            # Of the scenes that have an image: the same scenes, and the same samples of them.
            present = torch.tensor([pair.name in set(found.names) for pair in pairs.pairs])
            oracle = segmentation_estimates(real[metric.judge][present], protocol.bootstrap)[metric.value]
            interval = (oracle - estimates[metric.judge][metric.value]).interval(metric.bounds)
        else:
            interval = _distance(protocol, metric, found)
        metrics[name] = MetricRecord(**vars(interval), higher_is_better=metric.higher_is_better, **parts)
    return metrics, ceilings


def _distance(protocol: MapProtocol, metric: SetMetric, found: _Scored) -> Interval:
    """A distance between the distributions of real and generated images; the real ones are the protocol's own, and so
    only the generated ones vary."""
    distance, between = found.distances[metric.judge], DISTANCES[metric.value]
    reference, features = (distance.features(real=real)[1] for real in (True, False))
    distance.check_counts()
    if protocol.distribution_intervals == "jackknife":
        groups, level = protocol.distribution_replicates, protocol.bootstrap.level
        if len(features) < 3:  # one left out leaves a single image
            raise UserError(f"{protocol.name}: {len(features)} generated images; intervals of distances need three.")
        return jackknife_interval(features, lambda some: between(reference, some), groups, level, metric.bounds)
    samples = image_samples(len(found.names), protocol.bootstrap)[: protocol.distribution_replicates]
    replicas = torch.tensor([between(reference, features[one]) for one in samples], dtype=torch.float64)
    return Estimate(between(reference, features), replicas, protocol.bootstrap.level).interval(metric.bounds)


def _per_class(iou: list[float], pairs: Pairs) -> dict[str, float]:
    """The IoU of the classes that occur, by number, and by name where the data set has names."""
    names = pairs.names or ("",) * len(iou)
    numbered = enumerate(zip(names, iou, strict=True), 1)
    return {f"{k} {name}".strip(): value for k, (name, value) in numbered if not math.isnan(value)}


def _captions(images: MapImages, pairs: Pairs) -> dict[str, str]:
    """The digest of the images' prompts, if all of them are recorded."""
    prompts = [(pair.name, images.prompts.get(pair.name)) for pair in pairs.pairs]
    if any(prompt is None for _, prompt in prompts):
        return {}
    return {f"captions of {pairs.split}": digest_of_json(prompts)}

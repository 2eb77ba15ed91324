"""Scores of images drawn under semantic maps, under a protocol: what a segmenter sees in them, and FID and KID.

Truth, real images and generated ones show the same field of view: short side to the protocol's resolution (images
bicubic with antialiasing, labels nearest), centre crop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.data.conditions import labels_of, open_raw
from ether_diffusion.data.frames import Frame, scaled_size
from ether_diffusion.data.pairs import Pair, Pairs, find_pairs
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.metrics import InceptionDistance
from ether_diffusion.metrics.fid import frechet_distance, kernel_distance
from ether_diffusion.metrics.segmentation import class_counts, scores

from .averages import about, bootstrap_indices
from .data_digests import real_images_digest
from .image_lists import unrecorded
from .map_images import MapImages
from .protocols import MapProtocol
from .results import MetricRecord, Results, ScorerRecord, versions
from .scorers import Loaded
from .subject_images import duplicates, is_black, pixel_digest

DISTANCES = {"fid": frechet_distance, "kid": kernel_distance}


def find_scenes(
    protocol: MapProtocol, dataset: str | Path, captions: Path | None = None, caption_template: str | None = None
) -> Pairs:
    """The pairs that the protocol asks for.

    Args:
        dataset: ADEChallengeData2016 or a folder like it, or `builtin:scenes`.
        captions, caption_template: As for `find_pairs`.

    Raises:
        UserError: as `find_pairs`; too few pairs; another number of classes, or maps without real images.
    """
    pairs = find_pairs(
        dataset,
        split=protocol.split,
        condition="labels",
        captions=captions,
        caption_template=caption_template,
        limit=protocol.images,
    )
    assert pairs.palette is not None
    if len(pairs) < protocol.images:
        found = f"{len(pairs):,} pairs in split {protocol.split!r}"
        raise UserError(f"{dataset}: {found}; {protocol.name} takes {protocol.images:,}.")
    if len(pairs.palette) - 1 != protocol.num_classes:
        classes = len(pairs.palette) - 1
        raise UserError(f"{dataset}: {classes} classes; {protocol.name} is of {protocol.num_classes}.")
    lonely = next((pair.name for pair in pairs.pairs if pair.image is None), None)
    if lonely is not None:
        raise UserError(f"{dataset}: {lonely} has no real image, which {protocol.name} compares with.")
    return pairs


@dataclass(frozen=True)
class Scene:
    """A real image and its labels, (H, W) int64, as the protocol shows them."""

    name: str
    image: Image.Image
    labels: np.ndarray


def read_scene(pair: Pair, pairs: Pairs, side: int) -> Scene:
    """Open a pair. Raises UserError for a painted map, whose colours may stand for two classes, and for bad files."""
    assert pair.image is not None
    assert pair.condition is not None
    assert pairs.palette is not None
    image = open_photo(pair.image, upright=not pairs.as_stored)
    labels = labels_of(open_raw(pair.condition), pairs.palette)
    if labels is None:
        raise UserError(f"{pair.condition}: a painted map; expected one channel of labels to score against.")
    if labels.shape != (image.height, image.width):
        height, width = labels.shape
        raise UserError(f"{pair.condition}: {width} x {height}, but its image is {image.width} x {image.height}.")
    scaled = scaled_size(image.size, (side, side))
    frame = Frame.at(scaled, (side, side))
    resized = Image.fromarray(labels.astype(np.int32)).resize(scaled, Image.Resampling.NEAREST)
    shown = frame.cut(image.resize(scaled, Image.Resampling.BICUBIC))
    return Scene(pair.name, shown, np.asarray(frame.cut(resized)).astype(np.int64))


def score_maps(
    protocol: MapProtocol,
    pairs: Pairs,
    images: MapImages,
    judges: Mapping[str, Loaded],
    run: dict[str, Any],
    batch_size: int = 4,
) -> Results:
    """Ask the judges of all images that are there; those missing are counted. Reference of FID are all real images.

    Args:
        run: What was evaluated, as `MapImages.facts` tells it.

    Raises:
        UserError: an image cannot be read or is not of the protocol's size; none is there; a segmenter of other
            classes.
    """
    seen = _Seen(protocol, judges)
    for batch in _batches(pairs, images, protocol.resolution, batch_size):
        seen.add(batch)
    if not seen.keys:
        raise UserError(f"{images.folder}: none of the images of {pairs.folder}, split {pairs.split}, is there.")
    metrics, ceilings = _map_metrics(seen, pairs)
    return Results(
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        run={**run, **unrecorded(protocol, run)},
        data={
            f"maps of {pairs.split}": seen.truth.hexdigest(),
            f"images of {pairs.split}": real_images_digest(pairs),
            **_captions(images, pairs),
        },
        judges={name: ScorerRecord(source=judge.source, sha256=judge.sha256) for name, judge in judges.items()},
        versions=versions(),
        counts={
            "subjects": 0,
            "prompts": len(pairs),
            "images": len(seen.keys),
            "expected": len(pairs),
            "black": seen.black,
            "missing": len(pairs) - len(seen.keys),
            "duplicate": duplicates(seen.digests),
        },
        metrics=metrics,
        ceilings=ceilings,
    )


def _captions(images: MapImages, pairs: Pairs) -> dict[str, str]:
    """The digest of what the images were drawn from beside their maps, where they tell it."""
    prompts = [(pair.name, images.prompts.get(pair.name)) for pair in pairs.pairs]
    if any(prompt is None for _, prompt in prompts):
        return {}
    return {f"captions of {pairs.split}": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}


class _Seen:
    """What the judges have said so far."""

    def __init__(self, protocol: MapProtocol, judges: Mapping[str, Loaded]) -> None:
        self.protocol, self.judges = protocol, judges
        metrics = protocol.metrics.values()
        self.segmenters = list(dict.fromkeys(one.judge for one in metrics if one.kind == "segmentation"))
        self.counts: dict[tuple[str, bool], list[Tensor]] = {}
        inceptions = dict.fromkeys(one.judge for one in metrics if one.kind == "distribution")
        self.distances = {name: InceptionDistance(judges[name].network) for name in inceptions}
        self.keys: list[str] = []
        self.digests: list[str] = []
        self.black = 0
        self.truth = hashlib.sha256()  # of names and labels: pixels of a JPEG depend on who decodes it
        for name in self.segmenters:
            classes = judges[name].network.num_classes
            if classes != protocol.num_classes:
                raise UserError(f"judge {name}: {classes} classes; {protocol.name} is of {protocol.num_classes}.")

    def add(self, batch: list[tuple[Scene, Image.Image | None]]) -> None:
        for scene, _ in batch:
            self.truth.update(f"{scene.name} {scene.labels.shape} ".encode() + scene.labels.tobytes())
        drawn = [(scene, image) for scene, image in batch if image is not None]
        kinds = {
            True: ([scene.image for scene, _ in batch], [scene for scene, _ in batch]),
            False: ([image for _, image in drawn], [scene for scene, _ in drawn]),
        }
        for real, (images, scenes) in kinds.items():
            if not images:
                continue
            labels, keys = np.stack([scene.labels for scene in scenes]), [scene.name for scene in scenes]
            for name in self.segmenters:
                maps = self.judges[name].network(images)
                found = class_counts(maps, labels, self.protocol.num_classes)
                self.counts.setdefault((name, real), []).append(found)
            for distance in self.distances.values():
                distance.update(images, keys, real=real)
        for scene, image in drawn:
            self.keys.append(scene.name)
            if is_black(image):
                self.black += 1
            else:
                self.digests.append(pixel_digest(image))


def _map_metrics(seen: _Seen, pairs: Pairs) -> tuple[dict[str, MetricRecord], dict[str, float]]:
    """The metrics, and those of the segmenters for the real images."""
    protocol = seen.protocol
    draws = bootstrap_indices(len(seen.keys), protocol.bootstrap)
    maps = {name: _Maps.of(seen, name, draws) for name in seen.segmenters}
    metrics, ceilings = {}, {}
    for name, metric in protocol.metrics.items():
        per_class, absent = {}, []
        if metric.kind == "segmentation":
            found = maps[metric.judge]
            value, replicas = found.drawn[metric.value], [one[metric.value] for one in found.replicas]
            ceilings[name] = found.real[metric.value]
            if metric.value == "miou":
                per_class = _per_class(found.drawn["iou_per_class"], pairs)
                absent = found.drawn["absent_classes"]
        else:
            distance, between = seen.distances[metric.judge], DISTANCES[metric.value]
            reference, features = distance.features(real=True)[1], distance.features(real=False)[1]
            value = distance.compute()[metric.value]
            replicas = [between(reference, features[chosen]) for chosen in draws[: protocol.distribution_replicates]]
        low, high = about(value, torch.tensor(replicas, dtype=torch.float64), protocol.bootstrap.level, metric.bounds)
        metrics[name] = MetricRecord(
            value=value,
            low=low,
            high=high,
            higher_is_better=metric.higher_is_better,
            per_class=per_class,
            absent_classes=absent,
        )
    return metrics, ceilings


@dataclass(frozen=True)
class _Maps:
    """`segmentation.scores` of what one segmenter saw: in what was drawn, in its replicas, in the real images."""

    drawn: dict[str, Any]
    replicas: list[dict[str, Any]]
    real: dict[str, Any]

    @classmethod
    def of(cls, seen: _Seen, name: str, draws: Tensor) -> _Maps:
        counts = torch.cat(seen.counts[name, False]).double()  # (N, 3, C)
        times = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())
        sums = (times @ counts.flatten(1)).view(-1, *counts.shape[1:])
        real = torch.cat(seen.counts[name, True]).sum(dim=0)
        return cls(scores(*counts.sum(dim=0)), [scores(*one) for one in sums], scores(*real))


def _per_class(iou: list[float], pairs: Pairs) -> dict[str, float]:
    """Of the classes that occur, by number, and by name where the data set tells it."""
    names = pairs.names or ("",) * len(iou)
    numbered = enumerate(zip(names, iou, strict=True), 1)
    return {f"{k} {name}".strip(): value for k, (name, value) in numbered if not math.isnan(value)}


def _batches(
    pairs: Pairs, images: MapImages, side: int, batch_size: int
) -> Iterator[list[tuple[Scene, Image.Image | None]]]:
    for start in range(0, len(pairs), batch_size):
        batch = pairs.pairs[start : start + batch_size]
        yield [(read_scene(pair, pairs, side), images.open(pair.name, side)) for pair in batch]

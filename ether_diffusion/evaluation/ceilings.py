"""Ceilings: how like real photos of a subject are to one another, by a protocol's judges. They need no images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.metrics import LpipsDiversity
from ether_diffusion.metrics.pairwise import Pairs
from ether_diffusion.metrics.similarity import ImageSimilarity

from .averages import average, per_subject
from .data_digests import photos_digest
from .protocols import Averaging, SubjectProtocol
from .results import ScorerRecord, aligned, subjects_of, versions
from .scorers import Loaded
from .subject_images import BUILTIN, photos_of

FILE = "ceilings.json"


class Ceilings(Settings):
    """What the photos of subjects gave.

    Attributes:
        data: Digests of the photos.
        absent_subjects: Those of the protocol that there are no photos of.
        ceilings: By metric, averaged as the protocol averages.
        ceilings_per_subject: By metric and subject; subjects with a single photo have none.
    """

    protocol: str
    protocol_digest: str
    judges: dict[str, ScorerRecord]
    data: dict[str, str]
    versions: dict[str, str]
    absent_subjects: list[str]
    ceilings: dict[str, float]
    ceilings_per_subject: dict[str, dict[str, float]]

    def save(self, path: Path) -> Path:
        """Write it, whole or not at all."""
        write_whole(path, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
        return path

    def table(self) -> str:
        """For a terminal: a row a subject, and their average."""
        metrics, found = list(self.ceilings), self.ceilings_per_subject
        subjects = sorted({subject for values in found.values() for subject in values})
        rows = [("real images", *metrics)]
        for subject in subjects:
            cells = (f"{found[name][subject]:.3f}" if subject in found[name] else "" for name in metrics)
            rows.append((subject, *cells))
        rows.append(("all", *(f"{value:.3f}" for value in self.ceilings.values())))
        return "\n".join([self.protocol, aligned(rows), subjects_of(len(self.data), self.absent_subjects)])


def find_ceilings(
    protocol: SubjectProtocol, real: str | Path, judges: Mapping[str, Loaded], batch_size: int = 32
) -> Ceilings:
    """Of all subjects of the protocol that `real` has folders of.

    Args:
        real: Holds SUBJECT/ with photos; `builtin:` for the miniature's own.

    Raises:
        UserError: photos that cannot be read, or no subject with two of them.
    """
    names = [name for name in sorted(protocol.subjects) if str(real) == BUILTIN or (Path(real) / name).is_dir()]
    data, pairs = {}, {}
    for name in names:
        photos = photos_of(name, real)
        data[f"photos of {name}"] = photos_digest(photos)
        opened = list({photo.name: photo.open() for photo in photos}.items())
        seen = in_batches_of(judges, [image for _, image in opened], batch_size)
        pairs[name] = photo_pairs(name, dict(opened), protocol, judges, seen)
    if not any(pairs.values()):
        raise UserError(f"--real {real}: no folder of a subject of {protocol.name} with two photos or more.")
    mean, by_subject = ceilings_of(pairs, protocol.averaging)
    return Ceilings(
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        judges={name: ScorerRecord(source=judge.source, sha256=judge.sha256) for name, judge in judges.items()},
        data=data,
        versions=versions(),
        absent_subjects=[name for name in protocol.subjects if name not in names],
        ceilings={name: mean[name] for name in protocol.metrics if name in mean},
        ceilings_per_subject=by_subject,
    )


def photo_pairs(
    subject: str,
    photos: Mapping[str, Image.Image],
    protocol: SubjectProtocol,
    judges: Mapping[str, Loaded],
    features: Callable[[str], Any],
) -> dict[str, Pairs]:
    """Of each metric that compares images, all pairs of two photos; nothing of a single photo.

    Args:
        features: Of the photos, by a judge's name.
    """
    found, names = {}, list(photos)
    for name, metric in protocol.metrics.items():
        network = judges[metric.judge].network
        if len(photos) < 2 or metric.kind not in ("similarity", "distance"):
            continue
        if metric.kind == "similarity":
            likeness = ImageSimilarity(network)
            likeness.update_features(features(metric.judge), names, subject=subject, real=True)
            found[name] = likeness.real_pairs()[subject]
        else:
            distances = LpipsDiversity(network).update(list(photos.values()), names, group=subject)
            found[name] = distances.pairs()[subject]
    return found


def ceilings_of(
    pairs: Mapping[str, Mapping[str, Pairs]], averaging: Averaging
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """By metric: the average over subjects, and the value of each.

    Args:
        pairs: By subject and metric.
    """
    mean, by_subject = {}, {}
    for name in dict.fromkeys(name for found in pairs.values() for name in found):
        whole = {subject: {"": _whole(found[name])} for subject, found in pairs.items() if name in found}
        mean[name], by_subject[name] = average(whole, averaging), per_subject(whole)
    return mean, by_subject


def in_batches_of(
    judges: Mapping[str, Loaded], images: Sequence[Image.Image], batch_size: int
) -> Callable[[str], torch.Tensor]:
    """Features of images by a judge's name; each image passes each network once."""
    known: dict[str, torch.Tensor] = {}

    def features(judge: str) -> torch.Tensor:
        if judge not in known:
            network, starts = judges[judge].network, range(0, len(images), batch_size)
            known[judge] = torch.cat([network.image_features(images[k : k + batch_size]) for k in starts])
        return known[judge]

    return features


def _whole(pairs: Pairs) -> tuple[float, int]:
    return float(pairs.values[pairs.counted].sum()), int(pairs.counted.sum())

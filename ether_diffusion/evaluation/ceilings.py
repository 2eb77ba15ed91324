"""Ceilings: how similar real photos of a subject are to one another, by a protocol's scorers. No images are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from .results import ScorerRecord, aligned, provenance, subjects_of
from .scorers import Loaded
from .subject_images import BUILTIN, photos_of

FILE = "ceilings.json"


class Ceilings(Settings):
    """The scores of subjects' photos against one another.

    Attributes:
        data: Digests of the photos.
        absent_subjects: Subjects of the protocol without photos.
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
        """Write the ceilings as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
        return path

    def table(self) -> str:
        """The table for a terminal: a row for each subject, and their average."""
        metrics, found = list(self.ceilings), self.ceilings_per_subject
        subjects = sorted({subject for values in found.values() for subject in values})
        rows = [("real images", *metrics)]
        for subject in subjects:
            cells = (f"{found[name][subject]:.3f}" if subject in found[name] else "" for name in metrics)
            rows.append((subject, *cells))
        rows.append(("all", *(f"{value:.3f}" for value in self.ceilings.values())))
        return "\n".join([self.protocol, aligned(rows), subjects_of(len(self.data), self.absent_subjects)])


def find_ceilings(
    protocol: SubjectProtocol, real: str | Path, scorers: Mapping[str, Loaded], batch_size: int = 32
) -> Ceilings:
    """Score all subjects of the protocol that `real` has folders of.

    Args:
        real: Holds SUBJECT/ with photos; `builtin:` for the miniature's own.

    Raises:
        UserError: a photo cannot be read, or no subject has two photos.
    """
    names = [name for name in sorted(protocol.subjects) if str(real) == BUILTIN or (Path(real) / name).is_dir()]
    data, pairs = {}, {}
    for name in names:
        photos = photos_of(name, real)
        data[f"photos of {name}"] = photos_digest(photos)
        opened = {photo.name: photo.open() for photo in photos}
        pairs[name] = photo_pairs(name, opened, protocol, scorers, features_of(scorers, opened, batch_size))
    if not any(pairs.values()):
        raise UserError(f"--real {real}: no folder of a subject of {protocol.name} with two photos or more.")
    mean, by_subject = ceilings_of(pairs, protocol.averaging)
    return Ceilings(
        **provenance(protocol, scorers),
        data=data,
        absent_subjects=[name for name in protocol.subjects if name not in names],
        ceilings={name: mean[name] for name in protocol.metrics if name in mean},
        ceilings_per_subject=by_subject,
    )


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
        sums = {subject: {"": _sum(found[name])} for subject, found in pairs.items() if name in found}
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


def _sum(pairs: Pairs) -> tuple[float, int]:
    return float(pairs.values[pairs.counted].sum()), int(pairs.counted.sum())

"""Ceilings: how similar real photos of a subject are to one another, by a protocol's scorers. No images are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ether_diffusion.data.data_digests import photos_digest
from ether_diffusion.errors import UserError

from .protocols import SubjectProtocol
from .results import Record, aligned, provenance, subjects_of
from .scorers import Loaded
from .subject_images import BUILTIN, photos_of
from .subject_scores import ceilings_of, features_of, photo_pairs

FILE = "ceilings.json"


class Ceilings(Record):
    """The scores of subjects' photos against one another."""

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

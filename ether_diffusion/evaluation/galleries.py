"""Galleries: real images of other individuals, among which an image has to find its subject."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ether_diffusion.data.photos import Photo, find_photos
from ether_diffusion.files import digest_of_json
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, look_alikes

from .protocols import SubjectProtocol
from .scorers import Loaded

BUILTIN = "builtin:"

Gallery = Mapping[str, Photo]
"""Real images by name, opened when their features are computed."""
GalleryFeatures = dict[tuple[str, str], Tensor]
"""(D,) features by the digests of the scorer's weights and of the photo."""


def gallery_of(protocol: SubjectProtocol, subject: str, real: str | Path) -> Gallery:
    """The photos of the protocol's other subjects that `real` has, and for built-in subjects rendered look-alikes.

    Args:
        real: Holds SUBJECT/ with photos; `builtin:` for the miniature's own.
    """
    is_builtin = str(real) == BUILTIN
    found: dict[str, Photo] = {}
    for other in protocol.subjects:
        where = f"{BUILTIN}{other}" if is_builtin else str(Path(real) / other)
        if other != subject and ((is_builtin and other in SUBJECTS) or Path(where).is_dir()):
            found |= {f"{other}/{photo.name}": photo for photo in find_photos(where).photos}
    if is_builtin and protocol.look_alikes:
        kind = protocol.subjects[subject].class_name
        rendered = enumerate(look_alikes(kind, protocol.look_alikes))
        found |= {name: Photo(name, image) for name, image in ((f"look-alike {kind}/{k}", one) for k, one in rendered)}
    return found


def gallery_digest(gallery: Gallery) -> str:
    """SHA-256 of names and contents."""
    return digest_of_json({name: photo.digest for name, photo in gallery.items()}, sort_keys=True)


def gallery_features(gallery: Gallery, scorer: Loaded, known: GalleryFeatures, batch_size: int) -> Tensor:
    """(N, D) features; those that are not known are computed, a batch of images in memory at a time, and added."""
    keys = {name: (scorer.sha256, photo.digest) for name, photo in gallery.items()}
    missing = [name for name, key in keys.items() if key not in known]
    for start in range(0, len(missing), batch_size):
        names = missing[start : start + batch_size]
        images = [gallery[name].open() for name in names]
        known |= dict(zip((keys[name] for name in names), scorer.network.image_features(images), strict=True))
    return torch.stack([known[key] for key in keys.values()])

"""Quick scores by the miniature's own scorers: of a subject's images, and of images under label maps.

Similarity and segmentation are computed by the functions that protocols use. Recognised settings, copies of photos and
maps of other scenes are measured here only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.metrics.pairwise import cosines, cosines_among
from ether_diffusion.metrics.segmentation import SegmentationScore
from ether_diffusion.tinyworld.phrasing import SCENE, WHERE
from ether_diffusion.tinyworld.render import LABELS
from ether_diffusion.tinyworld.scenes import SETTINGS
from ether_diffusion.tinyworld.scoring import Scorers, to_pixels

from .results import aligned


@dataclass(frozen=True)
class SubjectScores:
    """Scores of one set of images of a subject.

    Attributes:
        identity: Mean cosine similarity of the backbone's features between photos and images, over all pairs; in the
            role of DINO.
        clip_i: The same of CLIP's image features.
        clip_t: Mean cosine similarity of CLIP's features between an image and its prompt without the identifier.
        settings: Share of the images whose setting CLIP recognises, of those whose prompt names one; nan if none does.
        copies: Share of the images that copy a photo, of those whose prompt names a setting; nan if none does. A copy
            keeps the photo's setting although the prompt names a different one, and its pixel distance to the photo is
            less than half the smallest distance between two photos.
    """

    identity: float
    clip_i: float
    clip_t: float
    settings: float
    copies: float


@dataclass(frozen=True)
class MapScores:
    """Scores of one set of images under label maps.

    Attributes:
        miou: Of the segmenter's maps against those of the scenes, over the whole set and the classes that occur.
        pixel_accuracy: Share of the labelled pixels.
        shuffled: mIoU against the maps of other scenes, half the set further on: what captions alone would give.
    """

    miou: float
    pixel_accuracy: float
    shuffled: float


TITLES = {
    "identity": "subject: backbone (role of DINO)",
    "clip_i": "subject: CLIP-I",
    "clip_t": "prompt: CLIP-T",
    "settings": "prompt: settings recognised",
    "copies": "copies of a photo",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "shuffled": "mIoU with other scenes' maps",
}


def score_images(
    scorers: Scorers, photos: Sequence[Image.Image], images: Sequence[Image.Image], prompts: Sequence[str]
) -> SubjectScores:
    """Score a subject's images; each has a prompt, without the identifier."""
    real, generated = scorers.image_features(photos), scorers.image_features(images)
    text = scorers.text_features(prompts)
    named = [(image, setting) for image, text in zip(images, prompts, strict=True) if (setting := setting_of(text))]
    return SubjectScores(
        identity=cosines(_numbered(scorers.identity(images)), _numbered(scorers.identity(photos))).mean(),
        clip_i=cosines(_numbered(generated), _numbered(real)).mean(),
        clip_t=float(cosines(_numbered(generated), _numbered(text)).values.diagonal().mean()),
        settings=_recognised(scorers, named) if named else np.nan,
        copies=_copies(scorers, photos, named) if named else np.nan,
    )


def score_photos(scorers: Scorers, photos: Sequence[Image.Image]) -> SubjectScores:
    """The similarity of the real photos to one another, each pair once; nan for what needs prompts."""
    features = scorers.identity(photos), scorers.image_features(photos)
    identity, clip_i = (cosines_among(_numbered(rows)).mean() for rows in features)
    return SubjectScores(identity, clip_i, clip_t=np.nan, settings=np.nan, copies=np.nan)


def score_scenes(scorers: Scorers, images: Sequence[Image.Image], labels: np.ndarray) -> MapScores:
    """Score images under label maps (B, 64, 64), in which 0 is unlabelled."""
    predicted = scorers.segment(images)
    own, other = (
        SegmentationScore(len(LABELS) - 1).update(predicted, maps).compute()
        for maps in (labels, np.roll(labels, len(labels) // 2, axis=0))
    )
    return MapScores(own["miou"], own["pixel_accuracy"], other["miou"])


def setting_of(prompt: str) -> str | None:
    """The setting that a prompt names in words of the world's captions; None if it names none, or several."""
    found = [name for name in SETTINGS if any(phrase in prompt for phrase in WHERE[name] + SCENE[name])]
    return found[0] if len(found) == 1 else None


def without_identifier(prompt: str, identifier: str) -> str:
    """ "a qwe toy in the snow" -> "a toy in the snow"."""
    return " ".join(word for word in prompt.split() if word != identifier)


def table(columns: Mapping[str, SubjectScores | MapScores]) -> str:
    """Scores side by side, for a terminal."""
    values = [asdict(scores) for scores in columns.values()]
    rows = [
        (TITLES[key], *("-" if np.isnan(column[key]) else f"{column[key]:.3f}" for column in values))
        for key in values[0]
    ]
    return aligned([("", *columns), *rows])


def _numbered(features: Tensor) -> tuple[list[str], Tensor]:
    return [str(k) for k in range(len(features))], features


def _recognised(scorers: Scorers, named: Sequence[tuple[Image.Image, str]]) -> float:
    found = scorers.settings([image for image, _ in named])
    return float(np.mean([one == setting for one, (_, setting) in zip(found, named, strict=True)]))


def _copies(scorers: Scorers, photos: Sequence[Image.Image], named: Sequence[tuple[Image.Image, str]]) -> float:
    real, generated = to_pixels(photos).flatten(1), to_pixels([image for image, _ in named]).flatten(1)
    smallest = torch.cdist(real, real).fill_diagonal_(torch.inf).min()
    places = scorers.settings(photos)
    elsewhere = torch.tensor([[place != setting for place in places] for _, setting in named])
    return float(((torch.cdist(generated, real) < smallest / 2) & elsewhere).any(dim=1).float().mean())

"""How well an adapter of the miniature draws its subject and follows its prompts: quick scores by its judges.

Likeness is what protocols measure, by the same functions; recognised settings and copies are told here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.metrics.pairwise import cosines, cosines_among
from ether_diffusion.tinyworld.phrasing import SCENE, WHERE
from ether_diffusion.tinyworld.scenes import SETTINGS
from ether_diffusion.tinyworld.scoring import Scorers, to_pixels

from .results import aligned


@dataclass(frozen=True)
class SubjectScores:
    """Of one set of images.

    Attributes:
        identity: Mean cosine between the backbone's features of photos and images, over all pairs: the role of DINO.
        clip_i: The same of CLIP's image features.
        clip_t: Mean cosine between CLIP's features of an image and of its prompt without the identifier.
        settings: Share of the images whose prompt names a setting in which CLIP recognises it; nan if none does.
        copies: Share of the images that repeat a photo, place and all, though their prompt names another setting than
            the photo's: pixel by pixel less than half as far from it as the two nearest photos are from each other.
            nan if no prompt names one.
    """

    identity: float
    clip_i: float
    clip_t: float
    settings: float
    copies: float


TITLES = {
    "identity": "subject: backbone (role of DINO)",
    "clip_i": "subject: CLIP-I",
    "clip_t": "prompt: CLIP-T",
    "settings": "prompt: settings recognised",
    "copies": "copies of a photo",
}
assert list(TITLES) == [field.name for field in fields(SubjectScores)]


def score(
    judges: Scorers, photos: Sequence[Image.Image], images: Sequence[Image.Image], prompts: Sequence[str]
) -> SubjectScores:
    """Scores of `images`, drawn from `prompts`, one each, which hold no identifier."""
    real, drawn = judges.image_features(photos), judges.image_features(images)
    text = judges.text_features(prompts)
    return SubjectScores(
        identity=cosines(_numbered(judges.identity(images)), _numbered(judges.identity(photos))).mean(),
        clip_i=cosines(_numbered(drawn), _numbered(real)).mean(),
        clip_t=float(cosines(_numbered(drawn), _numbered(text)).values.diagonal().mean()),
        settings=_recognised(judges, images, prompts),
        copies=_copies(judges, photos, images, prompts),
    )


def ceiling(judges: Scorers, photos: Sequence[Image.Image]) -> SubjectScores:
    """The likeness of the real photos to one another, each pair once; what needs prompts is nan."""
    features = judges.identity(photos), judges.image_features(photos)
    identity, clip_i = (cosines_among(_numbered(rows)).mean() for rows in features)
    return SubjectScores(identity, clip_i, clip_t=np.nan, settings=np.nan, copies=np.nan)


def setting_of(prompt: str) -> str | None:
    """The setting that a prompt names in words of the world's captions; None if it names none, or several."""
    found = [name for name in SETTINGS if any(phrase in prompt for phrase in WHERE[name] + SCENE[name])]
    return found[0] if len(found) == 1 else None


def without_identifier(prompt: str, identifier: str) -> str:
    """ "a qwe toy in the snow" -> "a toy in the snow"."""
    return " ".join(word for word in prompt.split() if word != identifier)


def table(columns: dict[str, SubjectScores]) -> str:
    """Scores side by side, for a terminal."""
    rows = [("", *columns)]
    for key, title in TITLES.items():
        values = [asdict(scores)[key] for scores in columns.values()]
        rows.append((title, *("-" if np.isnan(value) else f"{value:.3f}" for value in values)))
    return aligned(rows)


def _numbered(features: Tensor) -> tuple[list[str], Tensor]:
    return [str(k) for k in range(len(features))], features


def _recognised(judges: Scorers, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    asked = [(image, setting) for image, prompt in zip(images, prompts, strict=True) if (setting := setting_of(prompt))]
    if not asked:
        return float("nan")
    found = judges.settings([image for image, _ in asked])
    return float(np.mean([one == setting for one, (_, setting) in zip(found, asked, strict=True)]))


def _copies(
    judges: Scorers, photos: Sequence[Image.Image], images: Sequence[Image.Image], prompts: Sequence[str]
) -> float:
    asked = [(image, setting) for image, prompt in zip(images, prompts, strict=True) if (setting := setting_of(prompt))]
    if not asked:
        return float("nan")
    real, drawn = to_pixels(photos).flatten(1), to_pixels([image for image, _ in asked]).flatten(1)
    apart = torch.cdist(real, real).fill_diagonal_(torch.inf).min()
    places = judges.settings(photos)
    elsewhere = torch.tensor([[place != setting for place in places] for _, setting in asked])
    return float(((torch.cdist(drawn, real) < apart / 2) & elsewhere).any(dim=1).float().mean())

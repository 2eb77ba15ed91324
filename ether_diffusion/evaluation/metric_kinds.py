"""The kinds of metrics that protocols state: what each measures, its direction and its range."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ether_diffusion.config import Settings

from .intervals import Bounds

RANKING = ("retrieval", "rank")
"""The kinds that need a gallery of other individuals."""


class Metric(Settings):
    """What every metric states."""

    judge: str
    """The name of its scorer in the protocol."""
    higher_is_better: ClassVar[bool] = True

    @property
    def bounds(self) -> Bounds:
        """The range of the metric: of a cosine or of a difference of shares, unless the table says otherwise."""
        facts = self.model_dump()
        return _BOUNDS.get(facts["kind"]) or _BOUNDS.get(facts.get("value", ""), (-1.0, 1.0))


_BOUNDS: dict[str, Bounds] = {
    "distance": (0.0, math.inf),
    "diversity": (0.0, math.inf),
    "drift": (0.0, 2.0),
    "retrieval": (0.0, 1.0),
    "rank": (1.0, math.inf),
    "segmentation": (0.0, 1.0),
    "fid": (0.0, math.inf),
    "cmmd": (0.0, math.inf),
    "kid": (-math.inf, math.inf),  # an unbiased estimate, which may be below 0
}


class ImageMetric(Metric):
    """similarity: mean cosine similarity between features of generated and real images: DINO, CLIP-I. distance: mean
    LPIPS between them; the papers report it as diversity. diversity: mean LPIPS between the generated images of one
    prompt, each pair once."""

    kind: Literal["similarity", "distance", "diversity"]


class Text(Metric):
    """Mean cosine similarity between features of an image and of its prompt: CLIP-T."""

    kind: Literal["text"]
    identifier: bool = False
    """Whether the prompt keeps the identifier, a word that CLIP does not know."""


class Retrieval(Metric):
    """Mean average precision of the subject's photos in a gallery of other individuals, which each image ranks."""

    kind: Literal["retrieval"]


class Rank(Metric):
    """Mean place of the first photo of the subject in that ranking."""

    kind: Literal["rank"]
    higher_is_better: ClassVar[bool] = False


class Drift(Metric):
    """What training changed elsewhere: one minus the cosine similarity of two images of a prompt without the subject,
    generated from the same seed before and after training; mean over `drift_prompts`."""

    kind: Literal["drift"]
    higher_is_better: ClassVar[bool] = False


SubjectMetric = Annotated[ImageMetric | Text | Retrieval | Rank | Drift, Field(discriminator="kind")]


Agreement = Literal["miou", "miou_absent_zero", "mean_accuracy", "pixel_accuracy"]


class MapMetric(Metric):
    """Agreement between the label maps that a segmenter predicts for the images and those that they follow."""

    kind: Literal["segmentation"]
    value: Agreement


class Shortfall(Metric):
    """Agreement of the real images minus that of the images: how far control falls short of what the segmenter finds in
    perfect images. Below 0, images are easier to segment than real ones."""

    kind: Literal["shortfall"]
    value: Agreement
    higher_is_better: ClassVar[bool] = False


class SetMetric(Metric):
    """Distance between the set of images and the set of real images: FID, KID, CMMD."""

    kind: Literal["distribution"]
    value: Literal["fid", "kid", "cmmd"]
    higher_is_better: ClassVar[bool] = False


AnyMapMetric = Annotated[MapMetric | Shortfall | SetMetric, Field(discriminator="kind")]

"""Images of a frozen base under random transforms of growing distance, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.tinyworld.figures import Named, recognised
from ether_diffusion.tinyworld.scoring import Scorers

from .perturbation import PERTURBATIONS, Perturbation, perturbed

Images = Sequence[Image.Image]


@dataclass(frozen=True)
class Trial:
    """The k-th sample of random transforms of one kind at one distance."""

    method: str
    num_blocks: int
    distance: float
    k: int

    @property
    def title(self) -> str:
        return PERTURBATIONS[self.method].title


def plan(
    model: nn.Module,
    layers: Sequence[str],
    methods: Sequence[str],
    distances: Sequence[float],
    *,
    draws: int = 1,
    num_blocks: int | None = None,
) -> list[Trial]:
    """The trials of each method at the distances that it can have on these layers, and at the largest if it reaches it.

    Args:
        draws: Samples at every distance.
        num_blocks: Default: the paper's for each method.

    Raises:
        UserError: a method cannot have any of the distances.
    """
    trials = []
    for method in methods:
        kind = PERTURBATIONS[method]
        blocks = num_blocks or kind.num_blocks
        possible = possible_distances(kind, _widths(model, layers, kind), blocks, distances)
        if not possible:
            given = ", ".join(f"{distance:g}" for distance in distances)
            raise UserError(
                f"{kind.title} with {blocks} blocks can have none of the distances {given} on these layers."
            )
        trials += [Trial(method, blocks, distance, k) for distance in possible for k in range(draws)]
    return trials


def possible_distances(
    kind: Perturbation, widths: Sequence[int], num_blocks: int, distances: Sequence[float]
) -> list[float]:
    """The `distances` that a transform can have on sides of these widths, and its bound if it reaches it."""
    bound = min(kind.bound(width, num_blocks) for width in widths)
    below = [] if kind.fixed else sorted({d for d in distances if 0 < d < bound and not math.isclose(d, bound)})
    return [*below, bound] if kind.reached else below


def _widths(model: nn.Module, layers: Sequence[str], kind: Perturbation) -> list[int]:
    shapes = [model.get_parameter(f"{name}.weight").shape for name in layers]
    return sorted({shape[1 if side == "in" else 0] for shape in shapes for side in kind.sides})


def sweep(
    model: nn.Module, layers: Sequence[str], trials: Sequence[Trial], sample: Callable[[], Images], seed: int = 0
) -> Iterator[tuple[Trial, Images]]:
    """What `sample` generates in every trial, from the same noise each time, while `model` is perturbed."""
    for trial in trials:
        with perturbed(model, layers, trial.method, trial.distance, num_blocks=trial.num_blocks, seed=seed, k=trial.k):
            yield trial, sample()


def pixel_distance(images: Images, others: Images) -> float:
    """Root mean square difference between the pixels of images, from 0 to 1."""
    squares = [
        np.square((np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)) / 255).mean()
        for one, other in zip(images, others, strict=True)
    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def scores(
    images: Images, unperturbed: Images, scorers: Scorers | None, wanted: Sequence[Named]
) -> Mapping[str, float]:
    """Scores of perturbed images against the base's own; without the miniature's scorers `pixels` only.

    Returns:
        `pixels`: as `pixel_distance`. And `class`, `colour`, `setting`: as `tinyworld.figures.recognised`;
        `recognised`: their mean; `likeness`: the mean cosine similarity of CLIP's features to the base's images.
    """
    found = {"pixels": pixel_distance(images, unperturbed)}
    if scorers is None:
        return found
    shares = {"class": math.nan, "colour": math.nan, "setting": math.nan} | recognised(scorers, images, wanted)
    known = [share for share in shares.values() if not math.isnan(share)]
    cosines = (scorers.image_features(images) * scorers.image_features(unperturbed)).sum(dim=1)
    return {**found, **shares, "recognised": math.fsum(known) / len(known), "likeness": float(cosines.mean())}

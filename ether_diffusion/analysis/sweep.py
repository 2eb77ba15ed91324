"""A frozen base drawing under random transforms of growing distance: images, and how far they are from its own."""

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
    """The k-th draw of random transforms of one kind, at one distance."""

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
    """Every method at those of the distances that it can have on these layers; ETHER and ETHER+ at their largest, too.

    Args:
        num_blocks: Default: the paper's, of each method.

    Raises:
        UserError: a method can have none of them.
    """
    trials = []
    for method in methods:
        kind = PERTURBATIONS[method]
        blocks = num_blocks or kind.num_blocks
        possible = possible_distances(kind, _widths(model, layers, kind), blocks, distances)
        if not possible:
            given = ", ".join(f"{distance:g}" for distance in distances)
            raise UserError(f"No distance of {given} is one that {kind.title} with {blocks} blocks can have here.")
        trials += [Trial(method, blocks, distance, k) for distance in possible for k in range(draws)]
    return trials


def possible_distances(
    kind: Perturbation, widths: Sequence[int], num_blocks: int, distances: Sequence[float]
) -> list[float]:
    """Those of `distances` that a transform can have on sides of these widths, and its bound if it reaches it."""
    bound = min(kind.bound(width, num_blocks) for width in widths)
    below = [] if kind.fixed else sorted({d for d in distances if 0 < d < bound and not math.isclose(d, bound)})
    return [*below, bound] if kind.reached else below


def _widths(model: nn.Module, layers: Sequence[str], kind: Perturbation) -> list[int]:
    shapes = [model.get_parameter(f"{name}.weight").shape for name in layers]
    return sorted({shape[1 if side == "in" else 0] for shape in shapes for side in kind.sides})


def sweep(
    model: nn.Module, layers: Sequence[str], trials: Sequence[Trial], draw: Callable[[], Images], seed: int = 0
) -> Iterator[tuple[Trial, Images]]:
    """What `draw` draws in every trial, while `model` is perturbed; it draws from the same noise each time."""
    for trial in trials:
        with perturbed(model, layers, trial.method, trial.distance, num_blocks=trial.num_blocks, seed=seed, k=trial.k):
            yield trial, draw()


def pixel_distance(images: Images, others: Images) -> float:
    """Root of the mean square difference between images, pixel by pixel, in units of the whole range: 0 to 1."""
    squares = [
        np.square((np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)) / 255).mean()
        for one, other in zip(images, others, strict=True)
    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def scores(images: Images, unperturbed: Images, judges: Scorers | None, wanted: Sequence[Named]) -> Mapping[str, float]:
    """How far images are from those of the base as it is and, with the miniature's judges, what can be recognised.

    Returns:
        `pixels`: as `pixel_distance`. And `class`, `colour`, `setting`: as `tinyworld.figures.recognised`;
        `recognised`: their mean; `likeness`: the mean cosine of CLIP's features with those of the base's images.
    """
    found = {"pixels": pixel_distance(images, unperturbed)}
    if judges is None:
        return found
    shares = {"class": math.nan, "colour": math.nan, "setting": math.nan} | recognised(judges, images, wanted)
    known = [share for share in shares.values() if not math.isnan(share)]
    cosines = (judges.image_features(images) * judges.image_features(unperturbed)).sum(dim=1)
    return {**found, **shares, "recognised": math.fsum(known) / len(known), "likeness": float(cosines.mean())}

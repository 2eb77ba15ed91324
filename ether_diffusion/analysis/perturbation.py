"""Random transforms of a frozen base at a given distance from the identity (paper, Fig. 3).

They have the form of `ether.transform`, changes of the identity in blocks, so that weights and distances are computed
as for trained adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import optimize
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether import transform as T
from ether_diffusion.ether.frozen import layer_problem, merge_problem
from ether_diffusion.randomness import generator


def random_ether(features: int, num_blocks: int, distance: float, rng: torch.Generator) -> T.AnyChange:
    """Reflections at random hyperplanes. Their distance is always `2 sqrt(num_blocks)`.

    Raises:
        UserError: another distance was given.
    """
    fixed = 2 * math.sqrt(num_blocks)
    if not math.isclose(distance, fixed, rel_tol=1e-6):
        raise UserError(f"ETHER with {num_blocks} blocks is at distance {fixed:g} from the identity, not {distance:g}.")
    return T.ether(_normal(features, num_blocks, rng))


def random_ether_plus(features: int, num_blocks: int, distance: float, rng: torch.Generator) -> T.AnyChange:
    """`H+` with u in a random direction and v at the angle that gives the distance, the same in each block.

    The same generator gives the same two directions at every distance.

    Raises:
        UserError: the distance is above `sqrt(2 num_blocks)`.
    """
    bound = math.sqrt(2 * num_blocks)
    _check(distance, bound, f"ETHER+ with {num_blocks} blocks")
    u = T.unit(_normal(features, num_blocks, rng))
    across = _normal(features, num_blocks, rng)
    across = T.unit(across - (across * u).sum(dim=1, keepdim=True) * u)
    sine = min(1.0, distance / bound)  # ||H+ - I||_F^2 = 2 - 2 (u.v)^2 = 2 sin^2 in each block
    return T.ether_plus(u, math.sqrt(1 - sine * sine) * u + sine * across)


def random_oft(features: int, num_blocks: int, distance: float, rng: torch.Generator) -> T.Change:
    """Block-diagonal rotation R = (I - s Q)(I + s Q)^-1 of a random skew-symmetric Q, with s for the distance.

    The same generator gives the same Q at every distance.

    Raises:
        UserError: the distance is not below `oft_bound`.
    """
    width = features // num_blocks
    bound = oft_bound(features, num_blocks)
    _check(distance, bound, f"A rotation of {features} features in {num_blocks} blocks", open_end=True)
    q = torch.randn(num_blocks, width, width, generator=rng, dtype=torch.float64)
    q = q - q.mT
    # Q has the eigenvalues ±i t, so R - I has -2 s i t / (1 + s i t): ||R - I||_F^2 = sum of 4 s^2 t^2 / (1 + s^2 t^2).
    squares = torch.linalg.eigvalsh(q @ q.mT).clamp_min(0)

    def missing(log_s: float) -> float:
        turned = squares * math.exp(2 * log_s)
        return float((4 * turned / (1 + turned)).sum().sqrt()) - distance

    root: Any = optimize.brentq(missing, -100, 100, xtol=1e-14) if distance else -math.inf
    s = math.exp(root)
    identity = torch.eye(width, dtype=torch.float64).expand_as(q)
    # R - I = -2 s Q (I + s Q)^-1, written so that nothing cancels near the identity.
    change = torch.linalg.solve(identity + s * q, -2 * s * q, left=False)
    return T.Change(left=identity, right=change)


def oft_bound(features: int, num_blocks: int) -> float:
    """The upper bound of distances, which no rotation of this kind reaches: `2 sqrt(features)`, the distance of -I.

    A block of an odd width has one direction that no rotation moves, and which is left out.
    """
    return 2 * math.sqrt(features - num_blocks * (features // num_blocks % 2))


@dataclass(frozen=True)
class Perturbation:
    """A kind of random transform.

    Attributes:
        sample: The transform from features, number of blocks, distance and generator.
        sides: The sides of a layer that it transforms.
        bound: The largest distance, from features and number of blocks.
        num_blocks: The paper's, in its comparisons.
        reached: Whether the bound itself can be reached.
        fixed: Whether the bound is the only distance.
        authors_form: The kind of which this is the form in the authors' published code: the same but for the input side
            of several blocks (see `authors_weight`). Of analyses alone: no training method has it.
    """

    title: str
    sample: Callable[[int, int, float, torch.Generator], T.AnyChange]
    sides: tuple[str, ...]
    bound: Callable[[int, int], float]
    num_blocks: int = 1
    reached: bool = True
    fixed: bool = False
    authors_form: str | None = None


PERTURBATIONS = {
    "oft": Perturbation("OFT", random_oft, ("in",), oft_bound, num_blocks=4, reached=False),
    "ether": Perturbation("ETHER", random_ether, ("in",), lambda _, n: 2 * math.sqrt(n), fixed=True),
    "ether_plus": Perturbation("ETHER+", random_ether_plus, ("in", "out"), lambda _, n: math.sqrt(2 * n)),
}
PERTURBATIONS |= {
    f"{name}_authors": replace(PERTURBATIONS[name], title=title, num_blocks=4, authors_form=name)
    for name, title in (("ether", "ETHER, authors' code"), ("ether_plus", "ETHER+, authors' code"))
}


def authors_weight(weight: Tensor, change_in: T.Change, change_out: T.Change | None = None) -> Tensor:
    """The adapted weight (out, in, …) as the authors' published code computes it, where the paper has `T_out W T_in`.

    On the input side their code multiplies the r-th of n shares of the output rows with n copies of the r-th block, not
    every row with all n blocks. With one block, and on the output side, both are the same.

    Raises:
        UserError: the output rows do not divide into n shares.
    """
    blocks = len(change_in.left)
    if len(weight) % blocks:
        raise UserError(f"{len(weight)} output features do not divide into {blocks} shares, as in the authors' code.")
    shares = []
    for rows, left, right in zip(weight.chunk(blocks), change_in.left, change_in.right, strict=True):
        repeated = T.Change(left.expand(blocks, *left.shape), right.expand(blocks, *right.shape))
        shares.append(T.transform_weight(rows, repeated))
    changed = torch.cat(shares)
    return changed if change_out is None else changed + T.apply_change(change_out, changed, dim=0)


@contextmanager
def perturbed(
    model: nn.Module,
    layers: Sequence[str],
    method: str,
    distance: float,
    *,
    num_blocks: int = 1,
    seed: int = 0,
    k: int = 0,
) -> Iterator[float]:
    """Give these layers the weights T_out W T_in while the block runs, each with transforms of its own. The authors'
    form of a kind has the same directions as the kind.

    Args:
        method: One of `PERTURBATIONS`.
        distance: ||T - I||_F of every transform.
        seed, k: The k-th sample of this seed, with the same directions at every distance.

    Yields:
        The mean of the transforms' distances.

    Raises:
        UserError: a layer cannot have this distance or number of blocks, or its weight cannot be written.
    """
    kind = PERTURBATIONS[method]
    kept: dict[str, Tensor] = {}
    found: list[float] = []
    try:
        for name in layers:
            layer = model.get_submodule(name)
            if fault := merge_problem(layer):
                raise UserError(f"{name}: {fault}")
            weight, widths = _weight(layer), widths_of(name, layer, kind, num_blocks)
            directions = kind.authors_form or method
            changes = []
            for side, features in zip(kind.sides, widths, strict=True):
                rng = generator(seed, f"perturbation/{directions}/{name}/{side}", k)
                changes.append(kind.sample(features, num_blocks, distance, rng))
            found += [float(T.distance(change)) for change in changes]
            kept[name] = weight.clone()
            on_device = [T.Change(c.left.to(weight.device), c.right.to(weight.device)) for c in changes]
            change_out = on_device[1] if len(on_device) > 1 else None
            adapted = authors_weight if kind.authors_form else T.transform_weight
            weight.copy_(adapted(weight, on_device[0], change_out))
        yield math.fsum(found) / len(found)
    finally:
        for name, weight in kept.items():
            _weight(model.get_submodule(name)).copy_(weight)


def widths_of(name: str, layer: nn.Module, kind: Perturbation, num_blocks: int) -> tuple[int, ...]:
    """The widths of a layer's sides. Raises UserError where they cannot have this number of blocks."""
    shape = _weight(layer).shape
    widths = (shape[1], shape[0])[: len(kind.sides)]
    if problem := layer_problem(name, layer, kind.title, widths, num_blocks, narrowest=2):
        raise UserError(problem)
    return widths


def _weight(layer: nn.Module) -> Tensor:
    return layer.weight.data  # pyright: ignore[reportReturnType]


def _normal(features: int, num_blocks: int, rng: torch.Generator) -> Tensor:
    return torch.randn(num_blocks, features // num_blocks, generator=rng, dtype=torch.float64)


def _check(distance: float, bound: float, what: str, open_end: bool = False) -> None:
    beyond = distance >= bound if open_end else distance > bound * (1 + 1e-6)
    if distance < 0 or beyond:
        end = "to below" if open_end else "to"
        raise UserError(f"{what}: distance {distance:g} from the identity; expected 0 {end} {bound:.4g}.")

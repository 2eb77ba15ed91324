"""Results side by side. Results that were not measured in the same way are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.own_files import write_own

from .protocols import Protocol
from .results import MetricRecord, Results, aligned


def check_comparable(results: Mapping[str, Results], *, allow_incomplete: bool = False) -> None:
    """Refuse results whose protocol, scorers or data differ, or which have other numbers of images.

    Every pair is checked: two that differ may both agree with a third, which does not record what it was compared
    with.

    Args:
        results: By the names to use in messages.
        allow_incomplete: Do not refuse other numbers of images.

    Raises:
        UserError: the first difference, and the two results.
    """
    for (first, one), (second, other) in combinations(results.items(), 2):
        both = f"{first} and {second} cannot be compared"
        if one.protocol != other.protocol:
            raise UserError(f"{both}: protocols {one.protocol} and {other.protocol}.")
        if one.protocol_digest != other.protocol_digest:
            digests = f"{one.protocol_digest[:12]} and {other.protocol_digest[:12]}"
            raise UserError(f"{both}: their protocols of the name {one.protocol} differ (digests {digests}).")
        if set(one.judges) != set(other.judges):
            raise UserError(f"{both}: scorers {', '.join(one.judges)} and {', '.join(other.judges)}.")
        for scorer, record in one.judges.items():
            if record.sha256 != other.judges[scorer].sha256:
                digests = f"{record.sha256[:12]} and {other.judges[scorer].sha256[:12]}"
                raise UserError(f"{both}: scorer {scorer} has different weights (digests {digests}).")
        for name, digest in one.data.items():
            if other.data.get(name, digest) != digest:
                raise UserError(f"{both}: {name} differ (digests {digest[:12]} and {other.data[name][:12]}).")
        for metric in [name for name in one.metrics if name in other.metrics]:
            apart = set(one.metrics[metric].per_subject) ^ set(other.metrics[metric].per_subject)
            if apart:
                raise UserError(f"{both}: {metric} of different subjects: only one has {', '.join(sorted(apart))}.")
        if not allow_incomplete and images_of(one) != images_of(other):
            numbers = f"{images_of(one)} images and {images_of(other)}"
            raise UserError(f"{both}: {numbers}. Generate the missing ones, or take --allow-incomplete.")


def images_of(results: Results) -> str:
    """`3 of 18`: the images that were scored, and those that were asked for."""
    images = results.counts["images"]
    return f"{images:,} of {results.counts.get('expected', images + results.counts['missing']):,}"


def comparison(results: Mapping[str, Results], *, allow_incomplete: bool = False) -> str:
    """A table for a terminal: a row for each result, a column for each metric; then the faults of images.

    Raises:
        UserError: as `check_comparable`.
    """
    check_comparable(results, allow_incomplete=allow_incomplete)
    metrics = list(dict.fromkeys(metric for one in results.values() for metric in one.metrics))
    rows = [(next(iter(results.values())).protocol, *metrics, "images")]
    for name, one in results.items():
        rows.append((name, *(_cell(one.metrics.get(metric)) for metric in metrics), images_of(one)))
    notes = [
        f"{name}: {one.counted()}"
        for name, one in results.items()
        if any(one.counts.get(fault) for fault in ("missing", "black", "duplicate"))
    ]
    return "\n".join([aligned(rows), *notes])


def _cell(metric: MetricRecord | None) -> str:
    return "" if metric is None else f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


FILE = "checkpoints.json"


@dataclass(frozen=True)
class Choice:
    """The scores of a run's checkpoints, in the order of their steps.

    Attributes:
        scores: Values of the protocol's two metrics, by checkpoint.
        pareto: The checkpoints to choose from: none of them beats another in both metrics.
        best: One of them by a rule: the largest harmonic mean of the two scores, each as a share of the checkpoints'
            best. A checkpoint that is near the best in both beats one that is the best in one alone.
    """

    protocol: Protocol
    scores: Mapping[str, tuple[float, float]]
    pareto: tuple[str, ...]
    best: str

    def table(self) -> str:
        """The table for a terminal; a star marks the Pareto set."""
        rows: list[tuple[str, ...]] = [("checkpoint", *self.protocol.chosen_by, "Pareto set")]
        for name, values in self.scores.items():
            rows.append((name, *(f"{value:.3f}" for value in values), "*" if name in self.pareto else ""))
        rule = "largest harmonic mean of {} and {}, each as a share of the best among the checkpoints"
        return f"{aligned(rows)}\nBest: {self.best}, by the {rule.format(*self.protocol.chosen_by)}"

    def save(self, folder: Path) -> Path:
        """Write `checkpoints.json`, whole or not at all."""
        path = folder / FILE
        facts = {
            "protocol": self.protocol.name,
            "protocol_digest": self.protocol.digest,
            "metrics": self.protocol.chosen_by,
            "scores": self.scores,
            "pareto": self.pareto,
            "best": self.best,
        }
        write_own(path, json.dumps(facts, indent=1) + "\n")
        return path


def choose(protocol: Protocol, results: Mapping[str, Results]) -> Choice:
    """The Pareto set of a run's checkpoints, whose results come by name."""
    metrics = [next(iter(results.values())).metrics[name] for name in protocol.chosen_by]
    signs = [1 if metric.higher_is_better else -1 for metric in metrics]
    scores, gains = {}, {}
    for name, found in results.items():
        first, second = (found.metrics[metric].value for metric in protocol.chosen_by)
        scores[name], gains[name] = (first, second), (signs[0] * first, signs[1] * second)
    front = pareto(gains)
    best = max(front, key=lambda name: _balance(scores[name], list(scores.values()), signs))
    return Choice(protocol, scores, tuple(front), best)


def _balance(own: tuple[float, float], every: Sequence[tuple[float, float]], signs: Sequence[int]) -> float:
    """The harmonic mean of two scores' shares of the best; 0 if one of them is 0 or below."""
    shares = []
    for k, sign in enumerate(signs):
        best = max(scores[k] for scores in every) if sign > 0 else min(scores[k] for scores in every)
        part, whole = (own[k], best) if sign > 0 else (best, own[k])
        shares.append(part / whole if whole > 0 and part > 0 else float(own[k] == best))
    return 2 * shares[0] * shares[1] / sum(shares) if all(shares) else 0.0


def pareto(gains: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats: no other is at least as high in both values and higher in one."""
    return [
        name
        for name, own in gains.items()
        if not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in gains.values())
    ]

"""Results side by side, and the refusal to put side by side what was not measured alike."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from ether_diffusion.errors import UserError

from .results import MetricRecord, Results, aligned


def check_comparable(results: Mapping[str, Results]) -> None:
    """Numbers can be compared that one protocol gave, by the same judges, against the same photos or maps.

    Each is held against each other: two that do not compare may both compare with a third, which does not say what it
    was measured against.

    Args:
        results: By the names that errors shall call them.

    Raises:
        UserError: the first difference, and between which.
    """
    for (first, one), (second, other) in combinations(results.items(), 2):
        both = f"{first} and {second} cannot be compared"
        if one.protocol != other.protocol:
            raise UserError(f"{both}: protocols {one.protocol} and {other.protocol}.")
        if one.protocol_digest != other.protocol_digest:
            digests = f"{one.protocol_digest[:12]} and {other.protocol_digest[:12]}"
            raise UserError(f"{both}: {one.protocol} states different things in them (digests {digests}).")
        if set(one.judges) != set(other.judges):
            raise UserError(f"{both}: judges {', '.join(one.judges)} and {', '.join(other.judges)}.")
        for judge, record in one.judges.items():
            if record.sha256 != other.judges[judge].sha256:
                digests = f"{record.sha256[:12]} and {other.judges[judge].sha256[:12]}"
                raise UserError(f"{both}: judge {judge} has different weights (digests {digests}).")
        for name, digest in one.data.items():
            if other.data.get(name, digest) != digest:
                raise UserError(f"{both}: {name} differ (digests {digest[:12]} and {other.data[name][:12]}).")
        for metric in [name for name in one.metrics if name in other.metrics]:
            apart = set(one.metrics[metric].per_subject) ^ set(other.metrics[metric].per_subject)
            if apart:
                raise UserError(f"{both}: {metric} of different subjects: only one has {', '.join(sorted(apart))}.")


def comparison(results: Mapping[str, Results]) -> str:
    """A table for a terminal: a line for each, a column a metric, values with their intervals; then what is missing.

    Raises:
        UserError: they cannot be compared.
    """
    check_comparable(results)
    metrics = list(dict.fromkeys(metric for one in results.values() for metric in one.metrics))
    rows = [(next(iter(results.values())).protocol, *metrics)]
    for name, one in results.items():
        rows.append((name, *(_cell(one.metrics.get(metric)) for metric in metrics)))
    notes = [
        f"{name}: {one.counted()}"
        for name, one in results.items()
        if any(one.counts.get(fault) for fault in ("missing", "black", "duplicate"))
    ]
    return "\n".join([aligned(rows), *notes])


def _cell(metric: MetricRecord | None) -> str:
    return "" if metric is None else f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"

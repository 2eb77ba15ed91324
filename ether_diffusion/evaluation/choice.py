"""Which checkpoint to keep: those that no other beats in both metrics that the protocol chooses by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.files import write_whole

from .protocols import Protocol
from .results import Results, aligned

FILE = "checkpoints.json"


@dataclass(frozen=True)
class Choice:
    """The scores of a run's checkpoints, in the order of their steps.

    Attributes:
        scores: Values of the protocol's two metrics, by checkpoint.
        pareto: The checkpoints to choose from: none of them beats another in both metrics.
    """

    protocol: Protocol
    scores: Mapping[str, tuple[float, float]]
    pareto: tuple[str, ...]

    def table(self) -> str:
        """The table for a terminal; a star marks the Pareto set."""
        rows: list[tuple[str, ...]] = [("checkpoint", *self.protocol.chosen_by, "Pareto set")]
        for name, values in self.scores.items():
            rows.append((name, *(f"{value:.3f}" for value in values), "*" if name in self.pareto else ""))
        return aligned(rows)

    def save(self, folder: Path) -> Path:
        """Write `checkpoints.json`, whole or not at all."""
        path = folder / FILE
        facts = {
            "protocol": self.protocol.name,
            "protocol_digest": self.protocol.digest,
            "metrics": self.protocol.chosen_by,
            "scores": self.scores,
            "pareto": self.pareto,
        }
        write_whole(path, json.dumps(facts, indent=1) + "\n")
        return path


def choose(protocol: Protocol, results: Mapping[str, Results]) -> Choice:
    """The Pareto set of a run's checkpoints, whose results come by name."""
    metrics = [next(iter(results.values())).metrics[name] for name in protocol.chosen_by]
    signs = [1 if metric.higher_is_better else -1 for metric in metrics]
    scores, gains = {}, {}
    for name, found in results.items():
        first, second = (found.metrics[metric].value for metric in protocol.chosen_by)
        scores[name], gains[name] = (first, second), (signs[0] * first, signs[1] * second)
    return Choice(protocol, scores, tuple(pareto(gains)))


def pareto(gains: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats: no other is at least as high in both values and higher in one."""
    return [
        name
        for name, own in gains.items()
        if not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in gains.values())
    ]

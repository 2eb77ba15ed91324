"""The trainings behind what is reported: a run's own, or those of a benchmark's method, which may be one a subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"


def trainings_of(path: Path) -> list[Path]:
    """The run folders of what is reported: itself, or METHOD/run or METHOD/runs/SUBJECT of a benchmark."""
    if not (path / CONFIG).is_file():
        runs = [path / "run", *sorted(path.glob("runs/*"))]
        return [run for run in runs if (run / CONFIG).is_file()] or [path]
    return [path]


def config_beside(path: Path, images: Path) -> Path:
    """The config of the training that a folder of images was drawn from, which lies in `path`."""
    above = [folder for folder in (images, *images.parents) if folder.is_relative_to(path)]
    places = [*above, path / "runs" / images.name, path / "run"]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), path / CONFIG)


def shared_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all configs say alike, section by section."""
    first, *others = configs
    shared: dict[str, Any] = {}
    for key, value in first.items():
        theirs = [other.get(key) for other in others]
        if isinstance(value, dict) and all(isinstance(one, dict) for one in theirs):
            shared[key] = shared_settings([value, *theirs])  # pyright: ignore[reportArgumentType]
        elif all(one == value for one in theirs):
            shared[key] = value
    return shared


def mean_rows(trainings: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` averaged over trainings, step by step; null where one has no finite value."""
    if len(trainings) == 1:
        return [dict(row) for row in trainings[0]]
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for rows in trainings:
        for row in rows:
            if isinstance(row.get("step"), int):
                by_step.setdefault(row["step"], []).append(row)
    return [{"step": step, **_means(rows)} for step, rows in sorted(by_step.items()) if len(rows) == len(trainings)]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        values = [row.get(name) for row in rows]
        known = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
        found[name] = sum(known) / len(known) if len(known) == len(values) else None
    return found

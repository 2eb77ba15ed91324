"""The trainings behind a reported folder: a run's own, or those of a benchmark's method, one for each subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.generation.saved_run import CONFIG


def trainings_of(path: Path) -> list[Path]:
    """The run folders: the folder itself, or METHOD/run or METHOD/runs/SUBJECT of a benchmark."""
    runs = [path, path / "run", *sorted(path.glob("runs/*"))]
    found = [run for run in runs if (run / CONFIG).is_file()]
    return [path] if path in found or not found else found


def config_folder_of(path: Path, images: Path) -> Path:
    """The folder of the training in `path` that a folder of images was generated from."""
    above = [folder for folder in (images, *images.parents) if folder.is_relative_to(path)]
    places = [*above, path / "runs" / images.name, path / "run"]
    return next((place for place in places if (place / CONFIG).is_file()), path)


def shared_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that are equal in all configs, section by section."""
    first, *others = configs
    shared: dict[str, Any] = {}
    for key, value in first.items():
        theirs = [other.get(key) for other in others]
        if isinstance(value, dict) and all(isinstance(one, dict) for one in theirs):
            shared[key] = shared_settings([value, *theirs])  # pyright: ignore[reportArgumentType]
        elif all(one == value for one in theirs):
            shared[key] = value
    return shared


def is_log_row(row: Mapping[str, Any]) -> bool:
    """Whether a line of `metrics.jsonl` has a step, and numbers or null."""
    values = [value for value in row.values() if value is not None]
    return isinstance(row.get("step"), int) and all(isinstance(v, float) or _is_whole(v) for v in values)


def mean_rows(trainings: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` averaged over trainings: each step that all have, and for each of its other columns the
    mean, or None if a training has no finite number there."""
    by_step = [{row["step"]: row for row in rows} for rows in trainings]
    steps = sorted(set.intersection(*map(set, by_step)))
    return [{"step": step, **_means([rows[step] for rows in by_step])} for step in steps]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        values = [row.get(name) for row in rows]
        known = [float(v) for v in values if v is not None and math.isfinite(v)]
        found[name] = sum(known) / len(known) if len(known) == len(values) else None
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63

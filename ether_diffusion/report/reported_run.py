"""What a report tells of a run, read from its folder: settings, losses, scores and images, whatever of it is there."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ether_diffusion.adapters.methods import folder_of
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.generation import read_run

from .curves import Series
from .trainings import CONFIG, config_beside, mean_rows, shared_settings, trainings_of

SCORES, IMAGES = "scores.json", "images.jsonl"
_NO_LOSS = {"step", "learning_rate", "grad_norm", "seconds"}


@dataclass(frozen=True)
class FoundResults:
    """A `results.json`."""

    place: str
    """Its folder, within the run; "" for the run itself."""
    results: Results


@dataclass(frozen=True)
class QuickScores:
    """A `scores.json`, which `evaluate` writes for a run of the miniature."""

    place: str
    settings: dict[str, Any]
    """Of the drawing."""
    scores: dict[str, dict[str, float | None]]
    """Metrics by name, before and after training and of real images."""


@dataclass(frozen=True)
class ImageFolder:
    """Images drawn into one folder, as its `images.jsonl` lists them."""

    place: str
    folder: Path
    rows: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    """Of the training that they were drawn from."""

    @property
    def is_of_base(self) -> bool:
        """Drawn without adapter."""
        return all(row.get("adapter") is None and row.get("condition_encoder") is None for row in self.rows)


@dataclass(frozen=True)
class ReportedRun:
    """A run folder, a method of a benchmark, a folder of results, or a single file of results."""

    path: Path
    label: str
    """Told from those of the other runs of the report."""
    config: dict[str, Any]
    """What all its trainings have in common."""
    losses: tuple[Series, ...]
    """Means over its trainings."""
    facts: dict[str, str]
    results: tuple[FoundResults, ...]
    scores: tuple[QuickScores, ...]
    images: tuple[ImageFolder, ...]
    samples: tuple[Path, ...]
    """Validation sheets, by step."""
    notes: tuple[str, ...]
    """What is not as it should be, one line each."""

    def named(self, place: str, usual: str) -> str:
        """The label, and the place within the run where it is not the usual one."""
        return self.label if place in ("", usual) else f"{self.label}: {place}"


def short_labels(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all apart."""
    depth, labels = 0, [""] * len(places)
    while len(set(labels)) < len(labels) or not depth:
        depth += 1
        labels = ["/".join(place.parts[-depth:]) for place in places]
    return labels


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs of a report. A file of results goes by the name of its folder, where no other is named so.

    Raises:
        UserError: a path is no run, is given twice, or holds a file that cannot be read.
    """
    runs = [_read(Path(path).expanduser()) for path in paths]
    places = [run.path.resolve() for run in runs]
    for k, place in enumerate(places):
        if place in places[:k]:
            raise UserError(f"report: {runs[k].path} is given twice.")
    named = [place.parent if place.name in (RESULTS, SCORES) else place for place in places]
    labels = short_labels(named if len(set(named)) == len(named) else places)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings under `section.key`, in the order of the file, as they are written in YAML."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            )
    return flat


def _read(path: Path) -> ReportedRun:
    if path.is_file():
        if path.suffix != ".json":
            raise UserError(f"report: {path}: expected a run folder, {RESULTS} or {SCORES}, got another file.")
        if path.name == SCORES:
            return ReportedRun(path, "", {}, (), {}, (), (_quick_scores("", path),), (), (), ())
        return ReportedRun(path, "", {}, (), {}, (FoundResults("", Results.read(path)),), (), (), (), ())
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"report: {path}: no such run folder.{did_you_mean(path.name, siblings)}")
    trainings = trainings_of(path)
    config = shared_settings([_config(training / CONFIG) for training in trainings])
    read = [_rows(training / "metrics.jsonl") for training in trainings]
    rows, notes = mean_rows([found for found, _ in read]), [note for _, faults in read for note in faults]
    facts, told = _facts(trainings, config, rows)
    run = ReportedRun(
        path,
        "",
        config,
        tuple(_losses(rows)),
        facts,
        tuple(FoundResults(_place(path, file), Results.read(file)) for file in _found(path, RESULTS)),
        tuple(_quick_scores(_place(path, file), file) for file in _found(path, SCORES)),
        tuple(_image_folders(path, notes)),
        tuple(sorted(trainings[0].glob("samples/step-*.png"))) if len(trainings) == 1 else (),
        (*notes, *told),
    )
    if not (config or rows or run.results or run.scores or run.images):
        raise UserError(
            f"report: {path}: no run folder; expected config.yaml, metrics.jsonl, {RESULTS}, {SCORES} or {IMAGES}."
        )
    return run


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the config of a run; expected settings by name.")
    return config


def _quick_scores(place: str, path: Path) -> QuickScores:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = content.pop("scores")
        numbers = [value for told in scores.values() for value in told.values()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not scores of an evaluation ({type(error).__name__}: {error}).") from error
    if not all(value is None or isinstance(value, (int, float)) for value in numbers):
        raise UserError(f"{path}: not scores of an evaluation; expected numbers or null.")
    return QuickScores(place, content, scores)


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of JSON; those that a crash has cut short are counted in a note."""
    if not path.is_file():
        return [], []
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    broken = len(lines) - len(rows)
    return rows, [f"{path}: {broken:,} of {len(lines):,} lines cannot be read, and are left out."] * bool(broken)


def _losses(rows: Sequence[dict[str, Any]]) -> Iterator[Series]:
    """`loss` first. Where a step has no finite value, the trainer writes null."""
    rows = [row for row in rows if isinstance(row.get("step"), int)]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    steps = [row["step"] for row in rows]
    for name in names:
        if name not in _NO_LOSS:
            values = [row.get(name) for row in rows]
            yield Series(name, steps, [float(v) if isinstance(v, (int, float)) else math.nan for v in values])


def _facts(
    trainings: Sequence[Path], config: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, str], list[str]]:
    adapter, facts, notes = config.get("adapter") or {}, {}, []
    if config:
        facts["base"] = str(config.get("base_model"))
        facts["method"] = str(adapter.get("method"))
    if len(trainings) > 1:
        facts["trainings"] = str(len(trainings))
    for path in trainings:
        if any((path / part).is_dir() for part in ("adapter", "unet", "controlnet")):
            try:
                saved = read_run(path).trained
                facts |= {"method": saved.method, "trained parameters": f"{saved.parameters:,}"}
                if len(trainings) == 1:
                    facts["adapter's sha256"] = saved.digest[:12]
            except UserError as error:
                notes.append(str(error))
        elif config and (folder := folder_of(adapter.get("method"))):
            notes.append(f"{path}: no {folder}/ yet; its training has not come to its end.")
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float)) and math.isfinite(row["loss"])]
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        facts["steps"] = f"{rows[-1].get('step', len(rows)):,}"
        facts["loss, mean of the last tenth"] = f"{sum(last) / len(last):.4f}"
    seconds = sorted(row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float)))
    if seconds:
        facts["seconds a step, median"] = f"{seconds[len(seconds) // 2]:.3g}"
    faults = len(rows) - len(losses)
    if faults:
        notes.append(f"{trainings[0]}: {faults:,} steps without a finite loss.")
    return facts, notes


def _image_folders(path: Path, notes: list[str]) -> Iterator[ImageFolder]:
    for file in _found(path, IMAGES):
        rows, faults = _rows(file)
        notes += faults
        rows = [row for row in rows if isinstance(row.get("prompt"), str) and _is_inside(row.get("file"), file.parent)]
        if rows:
            yield ImageFolder(_place(path, file), file.parent, tuple(rows), _config(config_beside(path, file.parent)))


def _is_inside(file: object, folder: Path) -> bool:
    """A report shows nothing from elsewhere."""
    return isinstance(file, str) and "\0" not in file and (folder / file).resolve().is_relative_to(folder.resolve())


def _found(path: Path, name: str) -> list[Path]:
    files = ((file, file.relative_to(path).parts) for file in path.rglob(name))
    return sorted(file for file, parts in files if not any(part.startswith(".") for part in parts))


def _place(path: Path, file: Path) -> str:
    place = file.parent.relative_to(path).as_posix()
    return "" if place == "." else place

"""What a report shows of a run, read from its folder: settings, losses, scores and images, as far as they are there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ether_diffusion.adapters.methods import folder_of
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.evaluation.results import FILE as RESULTS
from ether_diffusion.evaluation.results import Results
from ether_diffusion.files import step_of
from ether_diffusion.generation import read_run
from ether_diffusion.generation.saved_run import read_config
from ether_diffusion.input_files import check_file, read_object

from .curves import Series
from .trainings import config_folder_of, is_log_row, mean_rows, shared_settings, trainings_of

SCORES, IMAGES = "scores.json", "images.jsonl"
_NO_LOSS = {"step", "learning_rate", "grad_norm", "seconds"}
Row = dict[str, Any]
"""A line of `metrics.jsonl` or `images.jsonl`."""


@dataclass(frozen=True)
class FoundResults:
    """A `results.json`."""

    place: str
    """Its folder, relative to the run; "" for the run itself."""
    results: Results


@dataclass(frozen=True)
class QuickScores:
    """A `scores.json`, which `evaluate` writes for a run of the miniature."""

    place: str
    settings: dict[str, Any]
    """Of the images: prompts, sampling, seed, adapter."""
    scores: dict[str, dict[str, float | None]]
    """Metrics by name, `before` and `after` training and of real images."""


class _Sampled(TypedDict, total=False):
    """What tables say about how images were sampled."""

    prompts: list[str]
    sampling: dict[str, Any] | None


@dataclass(frozen=True)
class ImageFolder:
    """A folder of generated images, as its `images.jsonl` lists them."""

    place: str
    folder: Path
    rows: tuple[Row, ...]
    config: dict[str, Any]
    """Of the training that they come from."""

    @property
    def is_of_base(self) -> bool:
        """Generated without adapter and condition encoder."""
        return all(row.get("adapter") is None and row.get("condition_encoder") is None for row in self.rows)


@dataclass(frozen=True)
class ReportedRun:
    """A run folder, a method of a benchmark, a folder of results, or a single file of results."""

    path: Path
    label: str = ""
    """Unique among the runs of the report."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings that all its trainings share."""
    losses: tuple[Series, ...] = ()
    """Means over its trainings."""
    facts: dict[str, str] = field(default_factory=dict)
    results: tuple[FoundResults, ...] = ()
    scores: tuple[QuickScores, ...] = ()
    images: tuple[ImageFolder, ...] = ()
    samples: tuple[Path, ...] = ()
    """Validation sheets, the lowest step first."""
    notes: tuple[str, ...] = ()
    """What is missing or broken, one line each."""

    def named(self, place: str, usual: str) -> str:
        """The label, followed by the place within the run unless it is the usual one."""
        return self.label if place in ("", usual) else f"{self.label}: {place}"


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs of a report. A file of results is labelled with its folder, unless another run has that label.

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


def short_labels(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as make all labels different."""
    depth, labels = 0, [""] * len(places)
    while len(set(labels)) < len(labels) or not depth:
        depth += 1
        labels = ["/".join(place.parts[-depth:]) for place in places]
    return labels


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by `section.key`, in the order of the file, with values as YAML writes them."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            flat[f"{prefix}{key}"] = text
    return flat


def _read(path: Path) -> ReportedRun:
    if path.is_file():
        if path.suffix != ".json":
            raise UserError(f"report: {path}: expected a run folder, {RESULTS} or {SCORES}, got another file.")
        if path.name == SCORES:
            return ReportedRun(path, scores=(_quick_scores("", path),))
        return ReportedRun(path, results=(FoundResults("", Results.read(path)),))
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"report: {path}: no such run folder.{did_you_mean(path.name, siblings)}")
    trainings, notes = trainings_of(path), []
    config = shared_settings([read_config(training) for training in trainings])
    logs = [training / "metrics.jsonl" for training in trainings]
    rows = mean_rows([_rows(log, notes, is_log_row, "a step and numbers") for log in logs])
    images = tuple(_image_folders(path, notes))
    facts = _facts(trainings, config, rows, notes)
    run = ReportedRun(
        path,
        config=config,
        losses=tuple(_losses(rows)),
        facts=facts,
        results=tuple(FoundResults(_place(path, file), Results.read(file)) for file in _found(path, RESULTS)),
        scores=tuple(_quick_scores(_place(path, file), file) for file in _found(path, SCORES)),
        images=images,
        samples=_samples(trainings[0]) if len(trainings) == 1 else (),
        notes=tuple(notes),
    )
    if not (config or rows or run.results or run.scores or run.images):
        raise UserError(
            f"report: {path}: no run folder; expected config.yaml, metrics.jsonl, {RESULTS}, {SCORES} or {IMAGES}."
        )
    return run


def _quick_scores(place: str, path: Path) -> QuickScores:
    content = read_object(path)
    try:
        scores = TypeAdapter(dict[str, dict[str, float | None]]).validate_python(content.pop("scores", None))
        TypeAdapter(_Sampled).validate_python(content)
    except ValueError as error:
        raise UserError(f"{path}: not scores of an evaluation ({' '.join(str(error).split())}).") from error
    return QuickScores(place, content, scores)


def _rows(path: Path, notes: list[str], fits: Callable[[Row], bool], expected: str) -> list[Row]:
    """Lines of JSON objects. A note says that a last line was cut short, as by a crash, and is left out.

    Raises:
        UserError: another line is no object that fits.
    """
    if not path.exists():
        return []
    text, rows = check_file(path).read_text(encoding="utf-8", errors="replace"), []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and fits(row):
            rows.append(row)
        elif rows and number == text.count("\n") + 1:
            notes.append(f"{path}: line {number:,}, the last one, is cut short, and is left out.")
        else:
            raise UserError(f"{path}:{number}: expected a JSON object with {expected}, got {line!r:.80}.")
    return rows


def _losses(rows: Sequence[Row]) -> Iterator[Series]:
    """Every column with numbers but those of `_NO_LOSS`, in the order of the file."""
    for name in dict.fromkeys(name for row in rows for name, value in row.items() if value is not None):
        if name not in _NO_LOSS:
            values = [math.nan if row.get(name) is None else row[name] for row in rows]
            yield Series(name, [row["step"] for row in rows], values)


def _facts(trainings: Sequence[Path], config: dict[str, Any], rows: Sequence[Row], notes: list[str]) -> dict[str, str]:
    """The columns of the report's first table. Adds notes on what is missing or broken."""
    adapter, facts = config.get("adapter") or {}, {}
    if config:
        facts = {"base": str(config.get("base_model")), "method": str(adapter.get("method"))}
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
            notes.append(f"{path}: no {folder}/ yet; its training has not ended, or diverged.")
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        facts["steps"] = f"{rows[-1]['step']:,}"
        facts["loss, mean of the last tenth"] = f"{sum(last) / len(last):.4f}"
    seconds = sorted(row["seconds"] for row in rows if row.get("seconds") is not None)
    if seconds:
        facts["seconds a step, median"] = f"{seconds[len(seconds) // 2]:.3g}"
    if len(losses) < len(rows):
        notes.append(f"{trainings[0]}: {len(rows) - len(losses):,} steps without a finite loss.")
    return facts


def _samples(training: Path) -> tuple[Path, ...]:
    steps = {file: step_of(file.with_suffix("")) for file in training.glob("samples/*.png")}
    known = {file: step for file, step in steps.items() if step is not None}
    return tuple(sorted(known, key=lambda file: known[file]))


def _image_folders(path: Path, notes: list[str]) -> Iterator[ImageFolder]:
    for file in _found(path, IMAGES):
        rows = _rows(file, notes, _is_image_row, "the texts prompt and file")
        rows = [row for row in rows if _is_inside(row["file"], file.parent)]
        if rows:
            config = read_config(config_folder_of(path, file.parent))
            yield ImageFolder(_place(path, file), file.parent, tuple(rows), config)


def _is_image_row(row: Row) -> bool:
    texts = (row.get("prompt"), row.get("file"), row.get("name", ""), row.get("condition", ""), row.get("fault", ""))
    return all(isinstance(text, str) for text in texts) and isinstance(row.get("height", 0), int)


def _is_inside(file: str, folder: Path) -> bool:
    """Whether a listed file lies in its folder: a report shows nothing from elsewhere."""
    return "\0" not in file and (folder / file).resolve().is_relative_to(folder.resolve())


def _found(path: Path, name: str) -> list[Path]:
    files = ((file, file.relative_to(path).parts) for file in path.rglob(name) if file.is_file())
    return sorted(file for file, parts in files if not any(part.startswith(".") for part in parts))


def _place(path: Path, file: Path) -> str:
    place = file.parent.relative_to(path).as_posix()
    return "" if place == "." else place

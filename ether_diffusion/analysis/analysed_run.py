"""Runs as analyses read them: method, learning rate, steps and base. The base is loaded once for many runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ether_diffusion.adapters.methods import METHODS, method_of
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, list_checkpoints, step_of
from ether_diffusion.generation import read_run
from ether_diffusion.generation.saved_run import SavedRun
from ether_diffusion.models.bases import load_base

Row = Mapping[str, Any]

# The columns in which runs of one method may differ, besides learning rate and seed.
APART = ("num_blocks", "rank", "sides", "target", "constrained", "other_settings", "steps", "base_model")
_NOT_SETTINGS = ("method", "init_from", "after")


def setup_of(run: SavedRun) -> dict[str, Any]:
    """A method's settings, from the run's config, or else from PEFT's. None: the method has no such setting.

    Returns:
        `num_blocks`, `rank`: for a second phase without such a setting, those of the previous adapter. `sides`: `in` or
        `both`. `target`: the preset, or names of layers. `constrained`: whether OFT was COFT; PEFT's config does not
        record it. `other_settings`: settings other than the method's defaults.
    """
    saved = run.trained if isinstance(run.trained, SavedAdapter) else None
    before = _of_peft(saved.before.config) if saved and saved.before else {}
    sizes = {name: before[name] for name in ("num_blocks", "rank", "sides") if name in before}
    settings: dict[str, Any] = dict(run.config.get("adapter") or {})
    if settings:
        own = {name: settings[name] for name in ("num_blocks", "rank", "sides", "constrained") if name in settings}
        target = settings.get("target")
        own |= {"target": None if target is None else _text(target), "other_settings": _others(settings)}
    else:
        own = _of_peft(saved.config) if saved else {}
    unknown = dict.fromkeys(("num_blocks", "rank", "sides", "target", "constrained"))
    return {**unknown, "other_settings": "", **sizes, **own}


def _of_peft(config: PeftConfig) -> dict[str, Any]:
    """The settings in PEFT's config of an adapter."""
    read: Any = config
    method = method_of(config)
    found: dict[str, Any] = {}
    for name, theirs in (("num_blocks", ("num_blocks", "boft_block_num", "r")), ("rank", ("r",))):
        if method and name in method.model_fields:
            found[name] = next((value for key in theirs if (value := getattr(read, key, None))), None)
    if hasattr(read, "sides"):
        found["sides"] = read.sides
    if getattr(read, "coft", False):
        found["constrained"] = True
    targets = read.target_modules
    return {**found, "target": targets if targets is None or isinstance(targets, str) else _text(sorted(targets))}


def _others(settings: Mapping[str, Any]) -> str:
    method = METHODS.get(settings.get("method", ""))
    fields = method.model_fields if method else {}
    changed = [
        f"{name} {_text(value)}"
        for name, value in settings.items()
        if name not in (*_NOT_SETTINGS, *APART) and (name not in fields or value != fields[name].default)
    ]
    # The source of a warm start is left out: it may be a run of the same seed.
    return "; ".join((["warm start"] if settings.get("init_from") else []) + changed)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def labels(rows: Sequence[Row], apart: Sequence[str] = APART) -> list[str]:
    """A name for each row: its `method`, and the settings in which rows of the method differ."""
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        alike[row["method"]].append(row)
    differing = {
        method: [name for name in apart if len({row.get(name) for row in found}) > 1] for method, found in alike.items()
    }
    return [
        ", ".join(filter(None, [row["method"], *(_word(name, row.get(name)) for name in differing[row["method"]])]))
        for row in rows
    ]


def _word(column: str, value: Any) -> str:
    if value is None:
        return ""
    match column:
        case "num_blocks":
            return f"n={value}"
        case "rank" | "seed":
            return f"{column} {value}"
        case "sides":
            return {"in": "one-sided", "both": "two-sided"}.get(value, str(value))
        case "constrained":
            return "constrained" if value else ""
        case "steps":
            return f"{value:,} steps"
    return str(value)


@dataclass(frozen=True)
class AnalysedRun:
    """A run folder, one of its checkpoints, or the folder of an adapter or a UNet.

    Attributes:
        facts: Columns of a table with a row for each run, those of `APART` among them: `run`, the folder's name;
            `method`, whose title COFT has of its own; the columns of `setup_of`; `learning_rate`, nan without a config;
            `steps` of training, None if neither a config nor a checkpoint has them; `seed`; `base_model`.
    """

    path: Path
    base_model: str
    revision: str | None
    facts: dict[str, Any]


def analysed_run(path: str | Path, name: str | None = None) -> AnalysedRun:
    """Read a run. Its name is the folder's, unless another is given.

    Raises:
        UserError: as `read_run`; the run trained its condition encoder only; or its base is not recorded.
    """
    path = Path(path)
    run = read_run(path)
    if not run.base_model:
        raise UserError(f"{path} does not record the base that it was trained on.")
    trained, setup = run.trained, setup_of(run)
    rate = _number(run, "training", "learning_rate")
    facts = {
        "run": name or path.resolve().name,
        "method": "COFT" if setup["constrained"] and trained.method == "OFT" else trained.method,
        **setup,
        "learning_rate": math.nan if rate is None else rate,
        "steps": _steps(trained.folder, run),
        "seed": _whole(_number(run, "seed")),
        "base_model": run.base_model,
    }
    return AnalysedRun(path, run.base_model, run.revision, facts)


def _number(run: SavedRun, *keys: str) -> float | None:
    """A number of the run's config; None if it has none. Raises UserError for anything else."""
    value: Any = run.config
    for key in keys:
        value = (value or {}).get(key)
    try:
        found = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if found is not None and not math.isfinite(found):
        raise UserError(f"{run.path}: config.yaml: {'.'.join(keys)}: {str(value)[:80]!r}; expected a number.")
    return found


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _steps(folder: Path, saved: SavedRun) -> int | None:
    """The step of the checkpoint that holds the folder; or the config's number of steps; or the last checkpoint's."""
    run = folder.resolve().parent
    own = step_of(run)
    if own is not None or not saved.config.get("training"):
        return own
    kept = list_checkpoints(run / CHECKPOINTS)
    return _whole(_number(saved, "training", "steps")) or (step_of(kept[-1]) if kept else None)


def analysed_runs(paths: list[Path]) -> list[AnalysedRun]:
    """Read several runs. Their names are the last parts of their paths, as many as make them unique.

    Raises:
        UserError: as `analysed_run`; or a run is given twice.
    """
    places = [path.resolve().parts for path in paths]
    if len(set(places)) < len(places):
        raise UserError("A run is given twice.")
    lengths = range(1, max(map(len, places), default=0) + 1)
    ways = (["/".join(parts[-length:]) for parts in places] for length in lengths)
    names = next((names for names in ways if len(set(names)) == len(names)), [])
    return [analysed_run(path, name) for path, name in zip(paths, names, strict=True)]


class Bases:
    """The UNets of base models in fp32; the last one is kept."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None] | None = None
        self._unet: nn.Module | None = None

    def unet(self, run: AnalysedRun) -> nn.Module:
        """The UNet of the base that a run was trained on, without the run's adapter."""
        key = (run.base_model, run.revision)
        unet = self._unet if key == self._key else None
        if unet is None:
            self._unet = None  # two at once may not fit in memory
            self._unet = unet = load_base(run.base_model, torch.float32, revision=run.revision).denoiser
            self._key = key
        return unet

"""Setups: the settings that runs share if they differ in seed only; as columns of a table, and as words of a legend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftConfig

from ether_diffusion.adapters.methods import METHODS, method_of
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.generation.saved_run import SavedRun

Row = Mapping[str, Any]

# The columns in which runs of one method may differ, besides learning rate and seed.
APART = ("num_blocks", "rank", "sides", "target", "constrained", "other_settings", "steps", "base_model")
_NOT_SETTINGS = ("method", "init_from", "after")


@dataclass(frozen=True)
class Setup:
    """A method's settings, from the run's config, or else from PEFT's. None: the method has no such setting.

    Attributes:
        num_blocks, rank: For a second phase without such a setting, those of the previous adapter.
        sides: `in` or `both`.
        target: The preset, or names of layers.
        constrained: Whether OFT was COFT; PEFT's config does not record it.
        other_settings: Settings other than the method's defaults.
    """

    num_blocks: int | None = None
    rank: int | None = None
    sides: str | None = None
    target: str | None = None
    constrained: bool | None = None
    other_settings: str = ""

    def columns(self) -> dict[str, object]:
        """The columns of a table."""
        return asdict(self)


def setup_of(run: SavedRun) -> Setup:
    """The setup of a run's adapter or whole module."""
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
    return Setup(**{**sizes, **own})


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
        case _:
            return str(value)

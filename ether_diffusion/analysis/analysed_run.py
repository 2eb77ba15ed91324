"""Runs as analyses read them: what was trained, at which rate, on which base; the base is loaded once for many runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.generation import read_run
from ether_diffusion.models.bases import load_base

from .setups import Setup, setup_of


@dataclass(frozen=True)
class AnalysedRun:
    """A run folder, a checkpoint of one, or the folder of an adapter or a UNet.

    Attributes:
        name: The folder's.
        title: Of the method, for people; COFT's is its own.
        setup: The method's settings.
        rate: The learning rate; nan where no config tells.
        steps: Taken until then; None where neither a config nor a checkpoint tells.
        seed: None where no config tells.
    """

    path: Path
    name: str
    title: str
    setup: Setup
    rate: float
    steps: int | None
    seed: int | None
    base_model: str
    revision: str | None

    def facts(self) -> dict[str, object]:
        """Columns of a table in which each run has a row: those of `setups.APART` are among them."""
        return {
            "run": self.name,
            "method": self.title,
            **self.setup.columns(),
            "learning_rate": self.rate,
            "steps": self.steps,
            "seed": self.seed,
            "base_model": self.base_model,
        }


def analysed_run(path: str | Path) -> AnalysedRun:
    """Read what a run says of itself.

    Raises:
        UserError: as `read_run`; or it trained nothing but a condition encoder; or its base is not known.
    """
    path = Path(path)
    run = read_run(path)
    trained = run.trained
    if not run.base_model:
        raise UserError(f"{path} does not say which base it was trained on.")
    training: dict[str, Any] = run.config.get("training", {})
    rate, setup = training.get("learning_rate"), setup_of(run)
    return AnalysedRun(
        path=path,
        name=path.resolve().name,
        title="COFT" if setup.constrained and trained.method == "OFT" else trained.method,
        setup=setup,
        rate=float("nan") if rate is None else float(rate),
        steps=_steps(trained.folder, training),
        seed=run.config.get("seed"),
        base_model=run.base_model,
        revision=run.revision,
    )


def _steps(folder: Path, training: dict[str, Any]) -> int | None:
    """Of the checkpoint that a part lies in; else as many as the run was to take; else of its last checkpoint."""
    run = folder.resolve().parent
    own = _step_of(run)
    if own is not None or not training:
        return own
    kept = [step for path in run.glob("checkpoints/*") if (step := _step_of(path)) is not None]
    return training.get("steps") or max(kept, default=None)


def _step_of(checkpoint: Path) -> int | None:
    name = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(name[1]) if name else None


def analysed_runs(paths: list[Path]) -> list[AnalysedRun]:
    """Several runs, with names that tell them apart: of as many of their path's last parts as it takes.

    Raises:
        UserError: as `analysed_run`; or a run is named twice.
    """
    places = [path.resolve().parts for path in paths]
    if len(set(places)) < len(places):
        raise UserError("A run is named twice.")
    lengths = range(1, max(map(len, places), default=0) + 1)
    ways = (["/".join(parts[-length:]) for parts in places] for length in lengths)
    names = next((names for names in ways if len(set(names)) == len(names)), [])
    runs = [analysed_run(path) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


class Bases:
    """The UNets of base models in single precision, the one that was asked for last."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None] | None = None
        self._unet: nn.Module | None = None

    def unet(self, run: AnalysedRun) -> nn.Module:
        """The UNet of the base that a run was trained on, as it was before."""
        key = (run.base_model, run.revision)
        if self._unet is None or key != self._key:
            self._unet = None  # two at a time may not fit
            self._unet = load_base(run.base_model, torch.float32, revision=run.revision).unet
            self._key = key
        return self._unet

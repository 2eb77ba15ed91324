"""Runs as analyses read them: method, learning rate, steps and base. The base is loaded once for many runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.files import CHECKPOINTS, list_checkpoints, step_of
from ether_diffusion.generation import read_run
from ether_diffusion.models.bases import load_base

from .setups import Setup, setup_of


@dataclass(frozen=True)
class AnalysedRun:
    """A run folder, one of its checkpoints, or the folder of an adapter or a UNet.

    Attributes:
        name: The folder's name.
        title: The method's title; COFT has its own.
        setup: The method's settings.
        rate: The learning rate; nan if there is no config.
        steps: Training steps; None if neither a config nor a checkpoint has them.
        seed: None if there is no config.
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
        """Columns of a table with a row for each run; they include those of `setups.APART`."""
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
    """Read a run.

    Raises:
        UserError: as `read_run`; the run trained its condition encoder only; or its base is not recorded.
    """
    path = Path(path)
    run = read_run(path)
    trained = run.trained
    if not run.base_model:
        raise UserError(f"{path} does not record the base that it was trained on.")
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
    """The step of the checkpoint that holds the folder; or the config's number of steps; or the last checkpoint's."""
    run = folder.resolve().parent
    own = step_of(run)
    if own is not None or not training:
        return own
    kept = list_checkpoints(run / CHECKPOINTS)
    return training.get("steps") or (step_of(kept[-1]) if kept else None)


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
    runs = [analysed_run(path) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


class Bases:
    """The UNets of base models in fp32; the last one is kept."""

    def __init__(self) -> None:
        self._key: tuple[str, str | None] | None = None
        self._unet: nn.Module | None = None

    def unet(self, run: AnalysedRun) -> nn.Module:
        """The UNet of the base that a run was trained on, without the run's adapter."""
        key = (run.base_model, run.revision)
        if self._unet is None or key != self._key:
            self._unet = None  # two at once may not fit in memory
            self._unet = load_base(run.base_model, torch.float32, revision=run.revision).unet
            self._key = key
        return self._unet

"""Runs as analyses read them: what was trained, at which rate, on which base; the base is loaded once for many runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.generation import read_run
from ether_diffusion.models.bases import load_base


@dataclass(frozen=True)
class AnalysedRun:
    """A run folder, a checkpoint of one, or the folder of an adapter or a UNet.

    Attributes:
        name: The folder's.
        title: Of the method, for people.
        rate: The learning rate; nan where no config tells.
        steps: How long it was to train; None where no config tells.
    """

    path: Path
    name: str
    title: str
    rate: float
    steps: int | None
    base_model: str
    revision: str | None


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
    rate = training.get("learning_rate")
    return AnalysedRun(
        path=path,
        name=path.resolve().name,
        title=trained.method,
        rate=float("nan") if rate is None else float(rate),
        steps=training.get("steps"),
        base_model=run.base_model,
        revision=run.revision,
    )


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
    return [AnalysedRun(**{**vars(run), "name": name}) for run, name in zip(runs, names, strict=True)]


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

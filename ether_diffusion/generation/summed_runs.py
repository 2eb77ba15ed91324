"""Several runs and LoRA files on one base, whose changes of its weights add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.adapters.foreign_lora import LoraFile, find_weights, read_lora
from ether_diffusion.adapters.saved_adapter import CONFIG as ADAPTER_CONFIG
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.adapters.weight_sum import Source
from ether_diffusion.errors import UserError
from ether_diffusion.hub import local_copy
from ether_diffusion.models.module_files import CONFIG as MODULE_CONFIG

from .saved_run import SavedRun, read_run

LARGEST_STRENGTH = 1000

Named = str | Path | SavedRun | LoraFile


@dataclass(frozen=True, repr=False)
class SummedRuns(SavedRun):
    """What `read_sum` returns: the parts of a sum as one run.

    `config`, and for a controllable run its condition encoder and ControlNet, are those of the run that follows
    conditions, else of the first one.
    """

    parts: tuple[tuple[SavedRun | LoraFile, float], ...] = ()
    """Each with its strength: the factor of its change of the base's weights."""

    def __repr__(self) -> str:
        return f"SummedRuns({', '.join(f'{str(part.path)!r}: {strength:g}' for part, strength in self.parts)})"

    @property
    def runs(self) -> list[SavedRun]:
        return [part for part, _ in self.parts if isinstance(part, SavedRun)]

    @property
    def changes(self) -> list[tuple[Source, float]]:
        """What changes the base's weights, with its strength."""
        sources = ((part if isinstance(part, LoraFile) else part.adapter, strength) for part, strength in self.parts)
        return [(source, s) for source, s in sources if isinstance(source, (SavedAdapter, LoraFile))]

    @property
    def base_model(self) -> str | None:
        """The base of all runs; of LoRA files alone, the one that they record.

        Raises:
            UserError: they name different ones.
        """
        bases = {part.base_model: part for part in self.runs or [part for part, _ in self.parts] if part.base_model}
        return self._only(bases, "was trained on the base", "Name one with --base-model.")

    @property
    def vae(self) -> str | None:
        """Raises UserError if runs were trained with different VAEs."""
        vaes = {run.vae: run for run in self.runs}
        return self._only(vaes, "was trained with the VAE", "Name one with --vae.")

    @property
    def revision(self) -> str | None:
        return self.revision_of(self.base_model)

    def revision_of(self, base: str | None) -> str | None:
        """Raises UserError if runs were trained on different revisions of this base."""
        revisions = {run.revision: run for run in self.runs if run.base_model == base}
        return self._only(revisions, "was trained on the revision", "Name a folder with --base-model.")

    def _only(self, found: dict[Any, Any], what: str, remedy: str) -> Any:
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            raise UserError(f"{one.path} {what} {first}, {other.path} {what} {second}. {remedy}")
        return next(iter(found), None)

    def record(self, scale: float = 1.0) -> list[dict[str, Any]]:
        """The digests and strengths of all changes, in an order of their own, for the settings of images."""
        found = [{"sha256": source.digest, "strength": strength * scale} for source, strength in self.changes]
        return sorted(found, key=lambda one: (one["sha256"], one["strength"]))


def read_sum(parts: Iterable[tuple[Named, float]]) -> SummedRuns:
    """Read runs and LoRA files that are to act together.

    Args:
        parts: Paths of runs, as for `read_run`, and of LoRA files, or what was read from them; each with its strength:
            1 as trained, 0 without effect, below 0 away from what was trained.

    Raises:
        UserError: none given; a strength that is not within ±1000; what `read_run` and `read_lora` raise; a whole UNet;
            or two runs that follow conditions.
    """
    read: list[tuple[SavedRun | LoraFile, float]] = []
    for named, strength in parts:
        if not abs(strength) <= LARGEST_STRENGTH:
            where = named if isinstance(named, (str, Path)) else named.path
            raise UserError(f"{where}: strength {strength:g}: expected a number within ±{LARGEST_STRENGTH}.")
        part = _read(named) if isinstance(named, (str, Path)) else named
        if isinstance(part, SavedRun) and not isinstance(part.adapter, SavedAdapter):
            encoder = part.condition_encoder
            if encoder is None or strength != 1:
                what = "follows conditions without an adapter" if encoder else "is a whole UNet"
                allowed = "its strength can only be 1" if encoder else "only adapters and LoRA files add up"
                raise UserError(f"{part.path} {what}: {allowed}.")
        read.append((part, float(strength)))
    if not read:
        raise UserError("expected one adapter or LoRA file at least.")
    return _summed(read)


def _summed(parts: Sequence[tuple[SavedRun | LoraFile, float]]) -> SummedRuns:
    runs = [part for part, _ in parts if isinstance(part, SavedRun)]
    following = [run for run in runs if run.condition_encoder is not None]
    if len(following) > 1:
        names = " and ".join(str(run.path) for run in following)
        raise UserError(f"{names} have a condition encoder each, and an image follows one; leave out the others.")
    main = next(iter([*following, *runs]), None)
    if main is None:
        return SummedRuns(parts[0][0].path, None, None, parts=tuple(parts))
    whole = None if isinstance(main.adapter, SavedAdapter) else main.adapter  # a ControlNet
    return SummedRuns(main.path, whole, main.condition_encoder, main.config, tuple(parts))


def _read(path: str | Path) -> SavedRun | LoraFile:
    """A run; or a LoRA file, or a folder of another program with one in it."""
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        return read_lora(path)
    folder = local_copy(path)
    is_ours = any((folder / config).is_file() for config in (ADAPTER_CONFIG, MODULE_CONFIG))
    return read_lora(folder) if find_weights(folder) and not is_ours else read_run(folder)

"""The start of a training: the base, or the changes of an adapter before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from ether_diffusion.adapters.attach import attach, detach
from ether_diffusion.adapters.methods import METHODS, MethodSettings
from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import read_run

from .changes import LayerChange, changes_of, layer_changes


def changes_at_start(unet: nn.Module, run: str | Path, device: str = "cpu") -> Iterator[LayerChange]:
    """Iterate over the layers that were changed before the first training step; none if training started at the base.

    They were changed by the adapter of `adapter.init_from`; by a previous adapter, which is merged; or by the method's
    initialisation, such as ETHER's, whose reflections are never the identity. It is repeated from the run's seed.

    Args:
        unet, device: As for `changes_of`.
        run: A run folder or a checkpoint folder of one.

    Raises:
        UserError: as `read_run`; the run's config is missing or of another version; or the adapter of
            `adapter.init_from` is gone.
    """
    saved = read_run(run)
    adapter: dict[str, Any] = saved.config.get("adapter") or {}
    if adapter.get("init_from"):
        try:
            yield from changes_of(unet, adapter["init_from"], device)
        except UserError as error:
            raise UserError(f"adapter.init_from: {error}") from error
    elif isinstance(saved.trained, SavedAdapter) and saved.trained.before is not None:
        yield from changes_of(unet, saved.trained.before.folder, device)
    elif not (settings := _settings(run, adapter)).starts_at_base:
        attach(unet, settings, saved.config.get("seed", 0))
        try:
            yield from layer_changes(unet, device)
        finally:
            detach(unet)


def _settings(run: str | Path, adapter: dict[str, Any]) -> MethodSettings:
    method = METHODS.get(adapter.get("method", ""))
    if method is None:
        raise UserError(f"{run}: no config.yaml that names a method; the start of the training is unknown.")
    try:
        return method.model_validate(adapter)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(f"{run}: config.yaml: adapter.{where}: {fault['msg']}.") from error

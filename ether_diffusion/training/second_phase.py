"""Training after another run: its adapter is merged into the base, and its condition encoder is used as it is.

The paper re-fits the magnitudes of OFT's weights in this way: OFT cannot change them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ether_diffusion.adapters.loading import check_fits, merge_saved
from ether_diffusion.adapters.saved_adapter import BEFORE, PREFIX, PreviousAdapter, SavedAdapter, read_previous_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import merge_problem
from ether_diffusion.models.bases import Base
from ether_diffusion.models.condition_encoder import FOLDER, find_condition_encoder

from .checkpoint import find_checkpoint
from .config import TaskConfig
from .run_folder import RunFolder

C = TypeVar("C", bound=TaskConfig)


def find_previous(config: C, folder: RunFolder) -> tuple[C, PreviousAdapter | None]:
    """The adapter that `adapter.after` names, if any, and the config with that adapter's layers as the target.

    A run that resumes has it in its own checkpoint, and does not need the other run any more.

    Raises:
        UserError: no adapter there; it was trained on another base; the base is to be quantised.
    """
    settings: Any = config.adapter
    after: Path | None = getattr(settings, "after", None)
    if after is None:
        return config, None
    if config.quantization is not None:
        raise UserError(f"quantization: {config.quantization}, but adapter.after is to be merged into these weights.")
    checkpoint = None
    if config.training.resume:
        checkpoint = find_checkpoint(folder.checkpoints, config.training.resume, lambda _: None)
    try:
        saved = read_previous_adapter(checkpoint.folder / "adapter" / BEFORE if checkpoint else after)
    except UserError as error:
        raise UserError(f"adapter.after: {error}") from error
    for key, theirs in (("base_model", saved.base_model), ("revision", saved.revision), ("vae", saved.vae)):
        ours = getattr(config, key)
        if theirs != ours and (theirs is not None or key == "vae"):
            raise UserError(f"{key}: {ours}, but adapter.after: {after} was trained on {theirs}. Set {key}={theirs}")
    if settings.target is None:
        config = config.model_copy(update={"adapter": settings.model_copy(update={"target": layers_of(saved)})})
    return config, saved


def layers_of(saved: SavedAdapter) -> list[str] | str:
    """The target that matches the layers of a saved adapter and no others."""
    config: Any = saved.config
    target, narrowed = config.target_modules, config.exclude_modules or getattr(config, "layers_to_transform", None)
    if target and target != "all-linear" and not narrowed:
        return target if isinstance(target, str) else sorted(target)
    return _adapted_layers(saved)


def check_previous(base: Base, previous: SavedAdapter | None) -> None:
    """Refuse a previous adapter that cannot be merged into this base, before anything that takes long.

    Raises:
        UserError: the adapter does not fit the base, or the base's weights are quantised.
    """
    if previous is None:
        return
    check_fits(base.denoiser, previous)
    for name in _adapted_layers(previous):
        problem = merge_problem(base.denoiser.get_submodule(name))
        if problem:
            raise UserError(f"adapter.after: {name}: {problem}")


def merge_previous(base: Base, previous: PreviousAdapter | None) -> None:
    """Merge a previous adapter, and those before it, into the denoiser, and their parts for it into text encoders."""
    if previous is None:
        return
    merge_saved(base.denoiser, previous)
    for name, encoder in base.trainable_text_encoders.items():
        merge_saved(encoder, previous, text_encoder=name)


def previous_encoder(previous: SavedAdapter, after: Path) -> Path:
    """The condition encoder of the run that `adapter.after` names.

    Raises:
        UserError: it has none: a run of another task, or an adapter without its run.
    """
    # A resumed run has it in its own checkpoint: the folder that holds `adapter/before/` holds the encoder too.
    source = previous.folder.parent.parent if previous.folder.name == BEFORE else after
    found = find_condition_encoder(source)
    if found is None:
        raise UserError(f"adapter.after: {after} holds no {FOLDER}/; expected the folder of a controllable run.")
    return found


def check_no_encoder(after: Path) -> None:
    """Refuse a controllable run as the previous one of a DreamBooth run: its condition encoder would be lost.

    Raises:
        UserError: the run has a condition encoder.
    """
    if find_condition_encoder(after) is not None:
        raise UserError(f"adapter.after: {after} is a controllable run, whose {FOLDER}/ a DreamBooth run would drop.")


def _adapted_layers(saved: SavedAdapter) -> list[str]:
    """The names of the layers that it adapts, from its tensors."""
    mark = "." + PEFT_TYPE_TO_PREFIX_MAPPING[saved.config.peft_type]  # pyright: ignore[reportArgumentType]
    return sorted({key.removeprefix(PREFIX).split(mark)[0] for key in saved.tensors if mark in key})

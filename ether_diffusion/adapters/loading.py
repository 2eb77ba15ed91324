"""Puts saved adapters into models: strictly, and completely or not at all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ether_diffusion.errors import Notice, UserError
from ether_diffusion.ether.frozen import ATTACH_FIRST, group_hook, is_offloaded
from ether_diffusion.hub import local_copy
from ether_diffusion.weight_files import failure_reason, misfits, unwrapped

from .attach import base_weights, check_not_nested, inject, merge, meta_copy, remove, restore
from .layer_outputs import changes_nothing
from .methods import facts_of, method_of
from .saved_adapter import (
    BEFORE,
    CONFIG,
    PREFIX,
    TEXT_ENCODER,
    TEXT_ENCODERS,
    PreviousAdapter,
    SavedAdapter,
    find_adapter,
    previous_adapter,
    read_adapter,
    set_previous_adapter,
    with_prefix,
)
from .undo import undone_on_failure


def load_adapter(
    model: nn.Module, adapter: str | Path | SavedAdapter, name: str = "default", *, text_encoder: bool | str = False
) -> SavedAdapter:
    """Put a saved adapter into a model and make it active. Either every tensor fits, or nothing is changed.

    The adapter that was merged into the base before this one was trained is merged into the model first. Warns with a
    `Notice` if the adapter changes nothing measurable.

    Args:
        model: The UNet of a pipeline, or whatever module the adapter was trained on; changed in place.
        adapter: What `read_adapter` returned, or a path for it. `adapter/text_encoder` of a run is its text encoder's.
            USER/NAME or USER/NAME@REVISION, where no folder USER is here: a repository of the hub.
        name: The adapter's name in the model. Others that the model carries stay there, inactive; one of this name is
            replaced.
        text_encoder: The model is a text encoder, and takes its part of the adapter: `True` or its name in the
            pipeline, `text_encoder_2`.

    Returns:
        What was put into the model: the adapter, or its part for the text encoder.

    Raises:
        UserError: as `read_adapter`; or the adapter does not fit the model: missing, extra or wrongly shaped tensors,
            or no part for a text encoder; or the model is offloaded; or an adapter before cannot be merged into it; or
            one of this name is merged.
    """
    if not isinstance(adapter, SavedAdapter):
        folder = find_adapter(local_copy(adapter))
        if folder.name in TEXT_ENCODERS and (folder.parent / CONFIG).is_file():
            folder, text_encoder = folder.parent, folder.name
        adapter = read_adapter(folder)
    which = TEXT_ENCODER if text_encoder is True else text_encoder or ""
    part = adapter.part(which) if which else adapter
    if any(is_offloaded(module) or group_hook(module) is not None for module in model.modules()):
        raise UserError(f"{part.folder}: {type(model).__name__} is offloaded: {ATTACH_FIRST}")
    with unwrapped(model) as bare, undone_on_failure(bare):
        check_fits(bare, part, replacing=name)
        with _merged_first(bare, adapter.before, which):
            remove(bare, name)
            with _settings_of(part, bare):
                inject(bare, part.config, name)
            fill_adapter(bare, part, name)
        inert = changes_nothing(bare, name)
    if inert:
        what = f"the adapter changes nothing measurable in this {type(model).__name__}; was it trained?"
        warnings.warn(f"{part.folder}: {what}", Notice, stacklevel=2)
    return part


def merge_saved(model: nn.Module, previous: PreviousAdapter, *, text_encoder: bool | str = False) -> None:
    """Merge an adapter, and those before it first, into a plain model for good. Does nothing if that was done already.

    The model keeps the adapter, to be saved together with one that is trained on it.

    Args:
        text_encoder: The model is a text encoder, and takes its parts of the adapters, as far as they have one: `True`
            or its name in the pipeline.

    Raises:
        UserError: an adapter does not fit the model, or cannot be merged into its weights, which are then as they were;
            or the model carries adapters already.
    """
    which = TEXT_ENCODER if text_encoder is True else text_encoder or ""
    with unwrapped(model) as bare, _merged_first(bare, previous, which):
        pass


@contextlib.contextmanager
def _merged_first(model: nn.Module, previous: PreviousAdapter | None, text_encoder: str) -> Iterator[None]:
    """As `merge_saved`, unless there is no adapter to merge. If the block fails, the weights are as they were.

    Args:
        text_encoder: The name of the text encoder that the model is; empty: it is none.
    """
    done = previous_adapter(model)
    if previous is None or (done is not None and done.digest == previous.digest):
        yield
        return
    if done is not None or hasattr(model, "peft_config"):
        raise UserError(
            f"{previous.folder} is to be merged into a plain model; this {type(model).__name__} has an adapter."
        )
    phases = (phase.text_encoders.get(text_encoder) if text_encoder else phase for phase in previous.phases)
    parts = [part for part in phases if part is not None]
    for part in parts:
        check_fits(model, part)
    weights: dict[nn.Parameter, Tensor] = {}
    with undone_on_failure(model):
        try:
            for part in parts:
                with _settings_of(part, model):
                    inject(model, part.config)
                weights = base_weights(model) | weights  # the first copy of each is the model's own
                fill(model, part, "default")
                merge(model)
            set_previous_adapter(model, previous)
            yield
        except BaseException:
            restore(weights)
            raise


def fill_adapter(model: nn.Module, saved: SavedAdapter, name: str = "default") -> None:
    """Copy saved tensors into an adapter that the model already carries.

    Raises:
        UserError: their tensors differ, or the saved one was trained after another adapter than is merged here.
    """
    with unwrapped(model) as bare:
        check_same_tensors(bare, saved, name)
        done = previous_adapter(bare)
        if saved.before is not None and (done is None or done.digest != saved.before.digest):
            raise UserError(f"{saved.folder} was trained after the adapter in its {BEFORE}/, which is not merged here.")
        fill(bare, saved, name)


def fill(model: nn.Module, saved: SavedAdapter, name: str) -> None:
    """As `fill_adapter`, without its checks."""
    # PEFT finds modules that are trained whole by the names that they have in this model, a `PeftModel` or not.
    start = PREFIX if any(key.startswith(PREFIX) for key, _ in model.named_parameters()) else ""
    shared = facts_of(saved.config).shared_tensors(model, name)
    own = {start + key.removeprefix(PREFIX): value for key, value in saved.tensors.items() if key.startswith(PREFIX)}
    others = {f"{key}.{name}": value for key, value in saved.tensors.items() if not key.startswith(PREFIX)}
    result = set_peft_model_state_dict(model, own | others, adapter_name=name)
    assert set(result.unexpected_keys) == others.keys(), result.unexpected_keys
    for key, value in others.items():
        shared[key].copy_(value)


def check_fits(model: nn.Module, saved: SavedAdapter, replacing: str | None = None) -> None:
    """Try the adapter on a meta copy of the model.

    Args:
        replacing: Name of an adapter in the model that it would replace, if there is one.

    Raises:
        UserError: names tensors that are missing, left over or of another shape.
    """
    method = method_of(saved.config)
    for name, module in model.named_modules():
        with _settings_of(saved, model):
            targeted = isinstance(module, (nn.Linear, nn.Conv2d)) and check_target_module_exists(saved.config, name)
        if method and targeted:
            problem = method.weight_problem(module)
            if problem:
                raise UserError(f"{saved.folder} ({method.title}) cannot adapt {name}: {problem}.")
    meta = meta_copy(model)
    if replacing is not None:
        remove(meta, replacing)
    with _settings_of(saved, model):
        inject(meta, saved.config, "candidate")
    check_not_nested(meta)
    check_same_tensors(meta, saved, "candidate")


@contextlib.contextmanager
def _settings_of(saved: SavedAdapter, model: nn.Module) -> Iterator[None]:
    """Raise what a saved adapter's settings make PEFT fail with, which may be anything, as one line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        raise _misfit(model, saved, str(error)) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {failure_reason(error)}"
        raise UserError(f"{saved.folder / CONFIG}: PEFT cannot use these settings ({reason}).") from error


def check_same_tensors(model: nn.Module, saved: SavedAdapter, name: str = "default") -> None:
    """As `check_fits`, for an adapter that the model already carries."""
    everything = {**model.state_dict(), **facts_of(saved.config).shared_tensors(model, name)}
    state = get_peft_model_state_dict(model, everything, adapter_name=name, save_embedding_layers=False)
    expected, found = (
        {with_prefix(key).removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in tensors.items()}
        for tensors in (state, saved.tensors)
    )
    faults = misfits(expected, found)
    if faults:
        raise _misfit(model, saved, f"of its {len(found)} tensors {'; '.join(faults)}.")


def _misfit(model: nn.Module, saved: SavedAdapter, reason: str) -> UserError:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    where = f"this {type(model).__name__}" + (f" ({path})" if path else "")
    base = f" It was trained on {saved.base_model}." if saved.base_model else ""
    one_line = " ".join(reason.split())  # of torch's own errors some have several
    return UserError(f"{saved.folder} does not fit {where}: {one_line}{base}")

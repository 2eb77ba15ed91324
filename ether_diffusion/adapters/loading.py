"""Saved adapters put back into models: strictly, and either wholly or not at all."""

from __future__ import annotations

import copy
from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import ATTACH_FIRST, group_hook, is_offloaded

from .attach import base_weights, detach, inject, merge, meta_copy, remove, restore, seeded
from .methods import method_of
from .peft_layers import shared_state
from .phases import (
    BEFORE,
    TEXT_ENCODER,
    PreviousAdapter,
    phases,
    previous_adapter,
    set_previous_adapter,
    weights_digest,
)
from .storage import PREFIX, SavedAdapter, read_adapter, with_prefix


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> SavedAdapter:
    """Put a saved adapter into a model and make it active. Either every tensor fits, or nothing is changed.

    An adapter that it was trained after is merged into the model first.

    Args:
        model: The UNet of a pipeline, or whatever module the adapter was trained on; changed in place. What a run
            trained beside the UNet stays on the disk: a text encoder's adapter is loaded by another call, from
            `adapter/text_encoder` into the text encoder.
        path: A run folder, a checkpoint folder, or a PEFT folder.
        name: The adapter's name in the model. Others that the model carries stay there, inactive; one of this name is
            replaced.

    Returns:
        What the folder says of the adapter: method, base, settings, tensors.

    Raises:
        UserError: as `read_adapter`; or the adapter does not fit the model: missing, extra or wrongly shaped tensors;
            or the model is offloaded; or an adapter before cannot be merged into it; or one of this name is merged.
    """
    saved = read_adapter(path)
    if any(is_offloaded(module) or group_hook(module) is not None for module in model.modules()):
        raise UserError(f"{saved.folder}: {type(model).__name__} is offloaded: {ATTACH_FIRST}")
    check_fits(model, saved, replacing=name)
    of_text = saved.folder.name == TEXT_ENCODER
    before = (saved.folder.parent if of_text else saved.folder) / BEFORE
    if before.is_dir():
        merge_saved(model, before, text_encoder=of_text)
    remove(model, name)
    with seeded(0):  # the initial values that the load overwrites draw nothing from the caller's generator
        inject(model, saved.config, name)
    fill_adapter(model, saved, name)
    return saved


def merge_saved(model: nn.Module, folder: Path, *, text_encoder: bool = False) -> None:
    """Merge a saved adapter, and those before it first, into a plain model for good. Where that was done, nothing is.

    The model remembers them: what is trained on it is saved together with them.

    Args:
        text_encoder: The model is a text encoder, and takes its parts of the adapters, as far as they have one.

    Raises:
        UserError: an adapter does not fit the model, or cannot be merged into its weights, which are then as they were;
            or the model carries adapters already.
    """
    done = previous_adapter(model)
    if done is not None and done.digest == weights_digest(folder):
        return
    if done is not None or hasattr(model, "peft_config"):
        raise UserError(f"{folder} is to be merged into a plain model; this {type(model).__name__} has an adapter.")
    parts = [(phase, phase / TEXT_ENCODER if text_encoder else phase) for phase in phases(folder)]
    found = [(phase, read_adapter(part)) for phase, part in parts if part.is_dir()]
    for _, saved in found:
        check_fits(model, saved)
    weights: dict[nn.Parameter, Tensor] = {}
    for phase, saved in found:
        with seeded(0):
            inject(model, saved.config, "default")
        weights = base_weights(model) | weights  # the first copy of each is the model's own
        fill_adapter(model, saved)
        try:
            merge(model)
        except UserError:
            detach(model)
            restore(weights)
            set_previous_adapter(model, None)
            raise
        set_previous_adapter(model, PreviousAdapter.read(phase))
    set_previous_adapter(model, PreviousAdapter.read(folder))


def fill_adapter(model: nn.Module, saved: SavedAdapter, name: str = "default") -> None:
    """Copy saved tensors into an adapter that the model already carries.

    Raises:
        UserError: the two do not have the same tensors; or these were trained after another adapter than the one that
            was merged into the model.
    """
    check_same_tensors(model, saved, name)
    check_same_previous(model, saved)
    shared = shared_state(model, name)
    tensors = {key if key.startswith(PREFIX) else f"{key}.{name}": tensor for key, tensor in saved.tensors.items()}
    result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    assert set(result.unexpected_keys) == shared.keys(), result.unexpected_keys
    for key, tensor in shared.items():
        tensor.copy_(tensors[key])


def check_fits(model: nn.Module, saved: SavedAdapter, replacing: str | None = None) -> None:
    """Try the adapter on a weightless copy of the model.

    Args:
        replacing: Name of an adapter that would make room for it, if the model has one of that name.

    Raises:
        UserError: says which tensors are missing, left over or of another shape.
    """
    method = method_of(saved.config)
    for name, module in model.named_modules():
        if method and isinstance(module, (nn.Linear, nn.Conv2d)) and check_target_module_exists(saved.config, name):
            problem = method.weight_problem(module)
            if problem:
                raise UserError(f"{saved.folder} ({method.title}) cannot be put on {name}: {problem}.")
    skeleton = meta_copy(model)
    if replacing is not None:
        remove(skeleton, replacing)
    try:
        with seeded(0):  # PEFT draws initial values before it knows that there is no memory for them
            inject(skeleton, copy.deepcopy(saved.config), "candidate")
    except ValueError as error:
        raise UserError(f"{saved.folder} does not fit {_describe(model)}: {error}{_trained_on(saved)}") from error
    check_same_tensors(skeleton, saved, "candidate")


def check_same_tensors(model: nn.Module, saved: SavedAdapter, name: str = "default") -> None:
    """Compare the names and shapes of a saved adapter's tensors with those of an adapter that the model carries.

    Raises:
        UserError: says which tensors are missing, left over or of another shape.
    """
    everything = {**model.state_dict(), **shared_state(model, name)}
    state = get_peft_model_state_dict(model, everything, adapter_name=name, save_embedding_layers=False)
    expected = {with_prefix(key): tuple(tensor.shape) for key, tensor in state.items()}
    found = {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()}
    faults = []
    for what, keys in (("missing", expected.keys() - found.keys()), ("left over", found.keys() - expected.keys())):
        if keys:
            faults.append(f"{len(keys)} {what}, e.g. {min(keys).removeprefix(PREFIX)}")
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    if wrong:
        key = wrong[0]
        faults.append(
            f"{len(wrong)} of another shape, e.g. {key.removeprefix(PREFIX)} is {found[key]} in the file and "
            f"{expected[key]} in the model"
        )
    if faults:
        raise UserError(
            f"{saved.folder} does not fit {_describe(model)}: of its {len(found)} tensors {'; '.join(faults)}."
            f"{_trained_on(saved)}"
        )


def check_same_previous(model: nn.Module, saved: SavedAdapter) -> None:
    """Compare what a saved adapter was trained after with what was merged into a model.

    Raises:
        UserError: it was trained after another adapter than that.
    """
    before, done = saved.folder / BEFORE, previous_adapter(model)
    if before.is_dir() and (done is None or done.digest != weights_digest(before)):
        raise UserError(f"{saved.folder} was trained after the adapter in its {BEFORE}/, which is not merged here.")


def _describe(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return f"this {type(model).__name__}" + (f" ({name})" if name else "")


def _trained_on(saved: SavedAdapter) -> str:
    return f" It was trained on {saved.base_model}." if saved.base_model else ""

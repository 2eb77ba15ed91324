"""Several adapters and LoRA files on one base: their changes of its weights add up, W + s1 (W1 - W) + s2 (W2 - W) + …

Unlike adapters on top of each other, each changes the base's own weights: their order means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import merge_problem

from .attach import detach, merge, restore
from .foreign_lora import LoraFile
from .loading import load_adapter, merge_saved
from .low_rank import Change, LowRank, adapted_layers, full_rank, merged_change, weight_changes
from .saved_adapter import TEXT_ENCODER, SavedAdapter, set_previous_adapter

ROUNDING = 2e-6
"""How far a change of a weight in single precision may be from the true one, relative to its norm."""
MERGE_ROUNDING = 5e-7
"""The same relative to the weight's norm: the change by merging is measured as a difference of two weights."""

Source = SavedAdapter | LoraFile
Addends = dict[str, dict[str, list[Change]]]
"""By part, as `unet` or `text_encoder`, and the name of a layer in it: its changes, strengths multiplied in."""


def add_up(models: Mapping[str, nn.Module], sources: Iterable[tuple[Source, float]], *, low_rank: bool) -> Addends:
    """The changes that adapters and LoRA files make to the weights of a base, each alone, times its strength.

    Args:
        models: Plain parts of the base in single precision, by their names in a pipeline; left as they are.
        sources: Each with its strength. Taken in an order of their own, so that theirs changes no bit.
        low_rank: Only factors are wanted. Closed forms are then compared with what merging does.

    Raises:
        UserError: a source does not fit the base, or the base is quantised; or an adapter's changes are not those of
            weights alone, or have full rank although factors are wanted.
        OSError: a closed form is not the change that merging makes.
    """
    for model in models.values():
        _check_plain(model)
    total: Addends = {}
    for source, strength in sorted(sources, key=lambda one: (one[0].digest, one[1])):
        if isinstance(source, LoraFile):
            source.check_fits(models)
        for part, model in models.items():
            if isinstance(source, LoraFile):
                found: Mapping[str, Change] = source.changes_of(model, part)
            else:
                found = _changes(model, source, part, checked=low_rank)
            for layer, change in found.items():
                scaled = (
                    LowRank(change.up * strength, change.down) if isinstance(change, LowRank) else change * strength
                )
                if not isinstance(scaled, LowRank) and low_rank:
                    assert isinstance(source, SavedAdapter)
                    raise full_rank(source, max(map(_rank, found.values())))
                total.setdefault(part, {}).setdefault(layer, []).append(scaled)
    return total


def dense(changes: Sequence[Change]) -> list[Tensor]:
    """The changes of one weight, each in its shape."""
    return [change.dense() if isinstance(change, LowRank) else change for change in changes]


def concatenated(changes: Sequence[Change]) -> LowRank:
    """The sum of the changes of one weight, all of which are factors, as factors: ranks add up."""
    ups, downs = zip(*(change for change in changes if isinstance(change, LowRank)), strict=True)
    assert len(ups) == len(changes)
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs)).at_most_full().balanced()


@torch.no_grad()
def write_into(models: Mapping[str, nn.Module], total: Mapping[str, Mapping[str, Sequence[Change]]]) -> None:
    """Add the changes to the weights of the parts of a base.

    Raises:
        UserError: a sum is not finite. Some weights are changed then.
    """
    for part, layers in total.items():
        for name, changes in layers.items():
            weight = models[part].get_parameter(f"{name}.weight")
            weight += sum(dense(changes))
            if not torch.isfinite(weight).all():
                raise UserError(f"{name}: the sum of the changes is not finite. Take smaller strengths.")


def _check_plain(model: nn.Module) -> None:
    """Refuse a base whose weights cannot be added to. Raises UserError."""
    for name, module in model.named_modules():
        problem = merge_problem(module) if isinstance(module, (nn.Linear, nn.Conv2d)) else None
        if problem:
            raise UserError(f"{name}: {problem}")


def _changes(model: nn.Module, saved: SavedAdapter, part: str, *, checked: bool) -> dict[str, Change]:
    """The changes of an adapter to a plain part of a base, which is left as it was.

    Args:
        checked: Compare closed forms with what merging does.
    """
    text = part if part.startswith(TEXT_ENCODER) else ""
    own = saved.text_encoders.get(text) if text else saved
    for phase in filter(None, [own, *saved.phases]):
        if getattr(phase.config, "modules_to_save", None):
            raise UserError(f"{phase.folder} holds whole modules (modules_to_save); only changes of weights add up.")
        if getattr(phase.config, "bias", "none") != "none" or getattr(phase.config, "lora_bias", False):
            raise UserError(f"{phase.folder} changes biases; only changes of weights add up.")
    if saved.before is not None:
        return _changes_of_phases(model, saved, text)
    if own is None:
        return {}
    load_adapter(model, saved, text_encoder=text)
    try:
        found = weight_changes(model, own)
        for name, layer in adapted_layers(model).items() if checked else ():
            _check_closed_form(own, name, found[name], *merged_change(layer))
        return found
    finally:
        detach(model)


def _check_closed_form(saved: SavedAdapter, name: str, change: Change, merged: Tensor, weight: Tensor) -> None:
    if not isinstance(change, LowRank):
        return
    error, norm, size = (float(tensor.norm()) for tensor in (change.dense() - merged, merged, weight))
    if error > ROUNDING * norm + MERGE_ROUNDING * size:
        raise OSError(f"{saved.folder}: the factors of {name} are not the change that merging makes.")


def _changes_of_phases(model: nn.Module, saved: SavedAdapter, text: str) -> dict[str, Change]:
    """As `_changes`, of an adapter that was trained after others: dense, for it acts on the weights that they made."""
    assert saved.before is not None
    kinds = (nn.Linear, nn.Conv2d)
    layers = {name: model.get_parameter(f"{name}.weight") for name, m in model.named_modules() if isinstance(m, kinds)}
    weights = {weight: weight.detach().clone() for weight in layers.values()}
    try:
        if text and text not in saved.text_encoders:
            merge_saved(model, saved.before, text_encoder=text)
        else:
            load_adapter(model, saved, text_encoder=text)
            merge(model)
        changes = {name: weight.detach() - weights[weight] for name, weight in layers.items()}
        return {name: change for name, change in changes.items() if change.any()}
    finally:
        detach(model)
        restore(weights)
        set_previous_adapter(model, None)


def _times(change: Change, strength: float) -> Change:
    return LowRank(change.up * strength, change.down) if isinstance(change, LowRank) else change * strength


def _rank(change: Change) -> int:
    return change.rank if isinstance(change, LowRank) else min(change.shape[0], change[0].numel())

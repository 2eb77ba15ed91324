"""Puts ETHER layers into a model: the method's `BaseTuner`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import BASE, EtherLayer
from .weight_model import WeightModel


class EtherModel(WeightModel):
    """A model whose target layers are adapted by ETHER or ETHER+.

    Made by `get_peft_model`, `inject_adapter_in_model` or diffusers' `add_adapter` from an `EtherConfig`.

    Example:
        >>> import ether_diffusion
        >>> unet.add_adapter(ether_diffusion.EtherConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    """

    prefix: str = "ether_"
    tuner_layer_cls = EtherLayer

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with mixed_batch(self, names):
            yield


@contextlib.contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block every sample of a batch takes an adapter of its own, of those that the model carries.

    `PeftModel.forward(adapter_names=…)` calls this. Call it yourself for a model without a `PeftModel` around it, as of
    diffusers. It stacks the vectors at each pass and cannot be compiled into one graph: for that there is a `Bank`.

    Args:
        names: One a sample; "__base__" or None: the base. A batch that is twice as long (classifier-free guidance)
            takes the names twice.

    Raises:
        TypeError: names is no list.
        ValueError: the model carries no adapter of one of these names; in a pass: batch and names differ in length, or
            adapters are merged.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"adapter_names: expected a list of names, got {names!r:.80}.")
    chosen = [BASE if name is None else name for name in names]
    parts = [part for part in model.modules() if isinstance(part, (EtherLayer, AuxiliaryTrainingWrapper))]
    known = {name for part in parts if isinstance(part, EtherLayer) for name in part.scaling}
    unknown = sorted(set(chosen) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; loaded: {', '.join(sorted(known))}."
        )

    def add_names(part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        samples = len(args[0] if args else next(iter(kwargs.values())))
        return args, {**kwargs, "adapter_names": chosen * (2 if samples == 2 * len(chosen) else 1)}

    handles = [part.register_forward_pre_hook(add_names, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

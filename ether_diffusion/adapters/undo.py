"""A model's modules, adapters and flags as they were, whatever fails while they are changed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block fails, in whatever way, undo what it did to the model, except for the values in its tensors.

    Modules have their own children, parameters and attributes again, and parameters require gradients as before.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    # `peft_config`, the children and hooks of a module, the scales of a layer: others may refer to the same containers.
    kinds = dict, OrderedDict, list, set
    values = [value for _, before in attributes for value in before.values() if type(value) in kinds]
    containers: list[tuple[Any, Any]] = [(value, value.copy()) for value in values]
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for container, before in [*attributes, *containers]:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        raise

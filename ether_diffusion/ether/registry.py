"""PEFT's tables of methods, and how a method of one's own is entered there."""

from __future__ import annotations

import enum
from typing import Any

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register(kind: enum.Enum, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Enter a method into PEFT's tables. Doing so again changes nothing.

    Args:
        kind: A member of an own enumeration of strings: PEFT's `PeftType` is closed.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a method of this name.
    """
    key: Any = kind
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(key)
    if known is config:
        return
    if known is not None or kind.name in peft.PeftType.__members__:
        raise RuntimeError(
            f"peft {peft.__version__} already has a method named {kind.name}, which ether_diffusion will not shadow: "
            "adapters of the two may not be interchangeable. Use a newer ether_diffusion, or an older peft."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = model
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = model.prefix

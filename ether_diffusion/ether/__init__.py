"""ETHER and ETHER+ as a PEFT method. Importing this package makes PEFT know it."""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import EtherConfig, EtherPeftType
from .layer import EtherLayer
from .model import EtherModel

__all__ = ["EtherConfig", "EtherLayer", "EtherModel", "EtherPeftType", "register"]


def register() -> None:
    """Enter ETHER into PEFT's tables of methods. Doing so again changes nothing.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a method named ETHER.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(EtherPeftType.ETHER)  # pyright: ignore[reportArgumentType]
    if known is EtherConfig:
        return
    if known is not None or EtherPeftType.ETHER.name in peft.PeftType.__members__:
        raise RuntimeError(
            f"peft {peft.__version__} already has a method named ETHER, which ether_diffusion will not shadow: "
            "adapters of the two may not be interchangeable. Use a newer ether_diffusion, or an older peft."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[EtherPeftType.ETHER] = EtherConfig  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[EtherPeftType.ETHER] = EtherModel  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[EtherPeftType.ETHER] = EtherModel.prefix  # pyright: ignore[reportArgumentType]


register()

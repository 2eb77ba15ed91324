"""ETHER and ETHER+ as a PEFT method. Importing this package makes PEFT know it."""

from __future__ import annotations

from . import registry
from .bank import Bank
from .config import EtherConfig, EtherPeftType
from .layer import EtherLayer
from .model import EtherModel, mixed_batch

__all__ = ["Bank", "EtherConfig", "EtherLayer", "EtherModel", "EtherPeftType", "mixed_batch", "register"]


def register() -> None:
    """Enter ETHER into PEFT's tables of methods. Doing so again changes nothing.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a method named ETHER.
    """
    registry.register(EtherPeftType.ETHER, EtherConfig, EtherModel)


register()

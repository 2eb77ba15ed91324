"""Reads a `.ckpt` that pickles more than tensors, also where it names classes of packages that are not installed.

Stable Diffusion v1 was published with the callbacks of its trainer beside the weights. The weights need none of them.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class StandIn:
    """Takes the place of a class or function that cannot be imported: takes whatever a pickle gives it, keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


def load_pickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What `torch.save` wrote, on the CPU, and the packages of which it names what cannot be imported, if any.

    Reading it may run any code.

    Raises:
        pickle.UnpicklingError: an object in it cannot be made; the message names such packages.
    """
    absent: dict[str, None] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):  # of a package that is not there, or is of another version
                absent[module.partition(".")[0]] = None
                return type(name.rpartition(".")[2], (StandIn,), {"__module__": module})

    # What torch.load asks of a module in the place of `pickle`; `load` reads the head of files from before torch 1.6.
    pickle_module: Any = SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=pickle.load)
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:  # objects are made by code of their own, which may fail in any way
        without = f"; not installed, or of another version: {', '.join(absent)}" if absent else ""
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}{without}") from error
    return found, tuple(absent)

"""Reads a `.ckpt` that pickles more than tensors, even objects of packages that are not installed.

Stable Diffusion v1 was published with its trainer's callbacks next to the weights, which do not need them.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class StandIn:
    """Replaces a class or function that cannot be imported: accepts all that a pickle passes to it, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = add = _ignore


def load_pickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What `torch.save` wrote, on the CPU, and the packages of objects that cannot be imported. It may run any code.

    Raises:
        pickle.UnpicklingError: an object cannot be built; the message names these packages.
    """
    absent: dict[str, None] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):  # of a package that is absent or of another version
                absent[module.partition(".")[0]] = None
                return type(name.rpartition(".")[2], (StandIn,), {"__module__": module})

    # What torch.load needs of its `pickle_module`; `load` reads the head of files from before torch 1.6.
    pickle_module: Any = SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=pickle.load)
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:  # objects are built by code of their own, which may fail in any way
        without = f"; not installed, or of another version: {', '.join(absent)}" if absent else ""
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}{without}") from error
    return found, tuple(absent)

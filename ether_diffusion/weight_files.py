"""Weights that others published: `torch.save`'s files read as plain tensors, and failed loads as one line."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import UserError
from .files import os_error_line

_FAILURES = (
    *(OSError, ValueError, RuntimeError, KeyError, EOFError, ImportError, TypeError),  # of torch and of the hub
    *(SafetensorError, pickle.UnpicklingError),
)
_OFFLINE = ("LocalEntry", "Offline", "Connect", "URLError", "gaierror")


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Objects other than tensors and plain containers are refused, not made.

    Raises:
        OSError, ValueError, RuntimeError, EOFError: not such a file.
        pickle.UnpicklingError: it holds other objects.
    """
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # of a zip archive, or of a pickle as torch wrote it before 1.6
            raise ValueError("it is not what torch.save writes")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_hub_name(name: str) -> bool:
    """Whether a name that is no path on disk has the form `user/repository`."""
    user, slash, repository = name.partition("/")
    return bool(user and slash and repository) and "/" not in repository and not name.startswith((".", "~"))


@contextlib.contextmanager
def loading(failure: str, remedy: str) -> Iterator[None]:
    """Turn what keeps weights from being found, read or fitted into one line: `failure: the reason. remedy`.

    Args:
        failure: Such as "DINO: cannot load 'dino.pth'".
        remedy: Sentences that say where to get the weights, and where to put them.

    Raises:
        UserError: the line. A UserError within the block passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(f"{failure}: {failure_reason(error)}. {remedy}") from error


def failure_reason(error: BaseException) -> str:
    """Why a load failed: one line of at most 240 characters, without a full stop."""
    cause: BaseException | None = error
    while cause is not None:
        if any(word in type(cause).__name__ for word in _OFFLINE):
            return "it is not in the local cache, and cannot be downloaded"
        cause = cause.__cause__ or cause.__context__
    text = os_error_line(error) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(text.split())[:240].rstrip(".") or type(error).__name__

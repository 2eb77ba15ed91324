"""Files of weights and their records: `torch.save`'s read as plain tensors, failed loads and misfits as one line."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import UserError
from .files import Digest, os_error_line
from .input_files import check_file

_FAILURES = (
    *(OSError, ValueError, RuntimeError, LookupError, EOFError, ImportError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, SafetensorError, pickle.UnpicklingError),
)
_OFFLINE = ("LocalEntry", "Offline", "Connect", "URLError", "gaierror")


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU. Objects other than tensors and plain containers are refused, not made.

    Raises:
        OSError, ValueError, RuntimeError, EOFError: not such a file.
        pickle.UnpicklingError: it holds other objects.
    """
    with check_file(path).open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # of a zip archive, or of a pickle as torch wrote it before 1.6
            raise ValueError("it is not what torch.save writes")
    if is_torchscript(path):
        raise ValueError("it is a TorchScript archive, which runs code of its own while it is read")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_pickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What `torch.save` wrote, on the CPU, and the packages of objects that cannot be imported. It may run any code.

    Stable Diffusion v1 was published with its trainer's callbacks next to the weights, which do not need them.

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
    check_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:  # objects are built by code of their own, which may fail in any way
        without = f"; not installed, or of another version: {', '.join(absent)}" if absent else ""
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}{without}") from error
    return found, tuple(absent)


class StandIn:
    """Replaces a class or function that cannot be imported: accepts all that a pickle passes to it, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = add = _ignore


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps the tensors of a file from replacing those of a model, by their names and shapes; empty: nothing."""
    pairs = ("missing", expected.keys() - found.keys()), ("left over", found.keys() - expected.keys())
    faults = [f"{len(keys)} {what}, e.g. {min(keys)}" for what, keys in pairs if keys]
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    if wrong:
        first = f"{wrong[0]} is {found[wrong[0]]} in the file and {expected[wrong[0]]} in the model"
        faults.append(f"{len(wrong)} of another shape, e.g. {first}")
    return faults


def sampled(tensor: Tensor, most: int) -> Tensor:
    """Up to `most` numbers of a tensor, at equal distances, as a flat view where that is possible."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // most)][:most]


def weights_digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None, samples: int = 1024) -> str:
    """A short digest of weights, in milliseconds: names, shapes and up to `samples` numbers of each tensor.

    Weights that were trained differently have different digests; it is no checksum of every number.

    Args:
        dtype: Of the numbers, where the digest is compared with one of weights that were loaded in this dtype.
    """
    digest = Digest(size=12)
    for key, tensor in sorted(weights.items()):
        picked = sampled(tensor, samples).to(dtype or tensor.dtype).to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}", picked.numpy().tobytes())
    return digest.hex()


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`: by the member that `torch.load` itself looks for."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the module that torch.compile or data parallelism wrap, with the parts that they wrap in it bare, too.

    A wrapper puts a name of its own into the names of all weights below it, which would fit no other model. After the
    block the wrappers in the model are back in their places.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    taken = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (inner := _wrapped(child)) is not None:
                taken.append((parent, name, child, inner))
                parent._modules[name] = inner
    try:
        yield model
    finally:
        for parent, name, child, inner in reversed(taken):
            if parent._modules.get(name) is inner:  # and not replaced by an adapted layer
                parent._modules[name] = child


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return module._modules.get("_orig_mod")


def is_hub_name(name: str) -> bool:
    """Whether a name that is no path on disk has the form `user/repository`."""
    user, slash, repository = name.partition("/")
    return bool(user and slash and repository) and "/" not in repository and not name.startswith((".", "~"))


@contextlib.contextmanager
def loading(failure: str, remedy: str = "") -> Iterator[None]:
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
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise  # the weights are not at fault
        raise UserError(f"{failure}: {failure_reason(error)}. {remedy}".rstrip()) from error


def failure_reason(error: BaseException) -> str:
    """Why a load failed: one line of at most 240 characters, without a full stop."""
    cause: BaseException | None = error
    while cause is not None:
        if any(word in type(cause).__name__ for word in _OFFLINE):
            return "it is not in the local cache, and cannot be downloaded"
        cause = cause.__cause__ or cause.__context__
    text = os_error_line(error) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(text.split())[:240].rstrip(".") or type(error).__name__

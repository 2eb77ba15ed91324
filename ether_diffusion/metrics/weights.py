"""Files of judges' weights: found or fetched, read without running code, digested; what is missing is one error."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.errors import UserError

T = TypeVar("T")


def loaded(what: str, source: str, ways: str, load: Callable[[], T]) -> T:
    """What `load` returns.

    Args:
        what: The judge, for the error.
        source: The name that was given.
        ways: Sentences that say where the weights are to be had, and where to put them.

    Raises:
        UserError: whatever kept the weights from being found, read or fitted, then the ways.
    """
    try:
        return load()
    except (
        OSError, ValueError, RuntimeError, KeyError, EOFError, ImportError, TypeError,
        HFValidationError, HfHubHTTPError, SafetensorError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise UserError(f"{what}: cannot load {source!r}: {_reason(error)}. {ways}") from error


def find_file(source: str, names: Sequence[str]) -> Path:
    """A file by its own path, by its folder, or in a repository of the hub.

    Args:
        names: What the file may be called inside a folder or a repository; the first that is there is taken.

    Raises:
        OSError: not there, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"the folder holds none of {', '.join(names)}")
    if path.suffix in _SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError("no such file or folder")
    error: Exception = FileNotFoundError(f"the repository holds none of {', '.join(names)}")
    for name in names:
        try:
            return Path(hf_hub_download(source, name))
        except (OSError, HfHubHTTPError) as found:  # not in the repository, or no way to it
            error = found
    raise error


def fetch(url: str) -> Path:
    """A file of torch's hub cache, downloaded into it where it is not there yet. Raises OSError."""
    path = cached(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Published names end in the beginning of the SHA-256, which the download is held against.
        torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[-1], progress=False)
    return path


def cached(url: str) -> Path:
    """Where torch's hub keeps the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, of what `torch.save` wrote, or of a TorchScript archive, by name.

    Pickled objects other than tensors are refused, not run.

    Raises:
        OSError, ValueError, RuntimeError, pickle.UnpicklingError: not such a file.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    if _is_torchscript(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # OpenAI's archives stay what they are
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # of a zip archive, or of a pickle as torch wrote it before 1.6
            raise ValueError("it is not what torch.save writes")
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    tensors = {name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by name")
    return tensors


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a network that was built without weights these ones, in fp32, and freeze it. What else is in `tensors` is
    passed over.

    Raises:
        ValueError: a weight is missing, or of another shape.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{len(missing)} of its {len(wanted)} weights are missing, {missing[0]} for one")
    wrong = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if wrong:
        shapes = (tuple(tensors[wrong[0]].shape), tuple(wanted[wrong[0]].shape))
        raise ValueError(f"{wrong[0]} is of shape {shapes[0]}, expected {shapes[1]}")
    chosen = {name: _weight(tensors.get(name), tensor) for name, tensor in wanted.items()}
    network.load_state_dict(chosen, assign=True)
    return network.eval().requires_grad_(False)


def pretrained(kind: Any, source: str, **options: Any) -> nn.Module:
    """A network of transformers, by hub name or folder, in fp32 and frozen.

    Args:
        kind: A class with `from_pretrained`.

    Raises:
        ValueError: a weight is missing, which transformers would draw at random.
        OSError: not there, or the hub cannot be reached.
    """
    if Path(source).suffix in _SUFFIXES and not Path(source).is_dir():
        raise FileNotFoundError("no such folder")
    network, info = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{len(missing)} of its {len(network.state_dict())} weights are missing, {missing[0]} for one")
    return network.eval().requires_grad_(False)


def digest(network: nn.Module) -> str:
    """SHA-256 of every weight, by name, shape and value in fp32: the same whatever file the weights came from."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            value = tensor.detach().to("cpu", torch.float32).contiguous()
            hashed.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return hashed.hexdigest()


_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt"}


def _weight(given: Tensor | None, wanted: Tensor) -> Tensor:
    if given is None:  # a count of batches, which no judge looks at
        return torch.zeros(wanted.shape, dtype=wanted.dtype)
    return given.to(wanted.dtype).clone()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _reason(error: BaseException) -> str:
    causes: list[Any] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    words = ("LocalEntry", "Offline", "Connect", "URLError", "gaierror")
    if any(word in type(cause).__name__ for cause in causes for word in words):
        return "it is not in the local cache, and cannot be downloaded"
    return " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__

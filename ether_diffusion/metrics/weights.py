"""Files of published weights of scorers: found or fetched, read without running code, loaded strictly, digested."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.files import Digest
from ether_diffusion.input_files import check_file
from ether_diffusion.weight_files import is_hub_name, is_torchscript, read_checkpoint


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
    if path.suffix in _SUFFIXES or not is_hub_name(source):
        raise FileNotFoundError("no such file or folder")
    error: Exception = FileNotFoundError(f"the repository holds none of {', '.join(names)}")
    for name in names:
        try:
            return Path(hf_hub_download(source, name))
        except (OSError, HfHubHTTPError) as found:  # not in the repository, or no way to it
            error = found
    raise error


def fetch(url: str) -> Path:
    """A file of torch's hub cache, downloaded into it if it is missing. Raises OSError."""
    path = cached(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Published names end in the first digits of the SHA-256, which the download is checked against.
        torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[-1], progress=False)
    return path


def cached(url: str) -> Path:
    """Where torch's hub keeps the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def read_tensors(path: Path, *, torchscript: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or of what `torch.save` wrote, by name.

    Args:
        torchscript: Read a TorchScript archive, too, which can run code of its own, and write files, while it is read.

    Raises:
        OSError, ValueError, RuntimeError, pickle.UnpicklingError: not such a file, or it holds Python objects.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        return load_file(check_file(path))
    if torchscript and is_torchscript(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # OpenAI publishes such archives
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    found = read_checkpoint(path)
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    tensors = {name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by name")
    return tensors


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Load weights into a network without weights (a meta copy), in fp32, and freeze it. Other tensors are ignored.

    Raises:
        ValueError: a weight is missing, or of another shape.
    """
    expected = network.state_dict()
    _check_complete([name for name in expected if name not in tensors and not _is_count(name)], len(expected))
    for name, tensor in expected.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape)
            raise ValueError(f"{name} is of shape {found}, expected {tuple(tensor.shape)}")
    chosen = {
        name: tensors[name].to(tensor.dtype).clone() if name in tensors else torch.zeros_like(tensor, device="cpu")
        for name, tensor in expected.items()
    }
    network.load_state_dict(chosen, assign=True)
    return network.eval().requires_grad_(False)


def pretrained(kind: Any, source: str, **options: Any) -> nn.Module:
    """A network of transformers, by hub name or folder, in fp32 and frozen.

    Args:
        kind: A class with `from_pretrained`.

    Raises:
        ValueError: a weight is missing, which transformers would initialise at random.
        OSError: not there, or the hub cannot be reached.
    """
    if Path(source).suffix in _SUFFIXES and not Path(source).is_dir():
        raise FileNotFoundError("no such folder")
    network, info = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    _check_complete(sorted(info["missing_keys"]), len(network.state_dict()))
    return network.eval().requires_grad_(False)


def digest(network: nn.Module) -> str:
    """SHA-256 of every weight, by shape and value in fp32, in any order: the same for every kind of file.

    Names and order are left out, because libraries change those of their modules between versions.
    """
    weights = [tensor for name, tensor in network.state_dict().items() if not _is_count(name)]
    return Digest().update(*sorted(map(_tensor_digest, weights))).hex()


def _tensor_digest(tensor: Tensor) -> str:
    value = tensor.detach().to("cpu", torch.float32).contiguous()
    return Digest().update(str(tuple(value.shape)), value.numpy().tobytes()).hex()


_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt"}


def _is_count(name: str) -> bool:
    """Whether it is a batch norm's number of batches, which frozen networks do not read."""
    return name.endswith("num_batches_tracked")


def _check_complete(missing: Sequence[str], total: int) -> None:
    if missing:
        raise ValueError(f"{len(missing)} of its {total} weights are missing, e.g. {missing[0]}")

"""Latents and text features computed once, kept on disk: afterwards neither VAE nor text encoder is needed.

What is kept of a picture are the moments of its latents, from which every step samples anew. Files are found by what
they were made from: the encoder's weights, and the picture's exact pixels or the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.photo_dataset import DreamBoothDataset, PixelsKey
from ether_diffusion.files import partial_of
from ether_diffusion.models.bases import fingerprint
from ether_diffusion.progress import progress_bar

Moments = tuple[Tensor, Tensor]  # mean and standard deviation of the latents, each (C, h, w) in fp32


class EncodedDataset(Dataset[dict[str, Any]]):
    """The samples of a DreamBoothDataset with `moments` and `class_moments` in the place of pixels."""

    def __init__(self, dataset: DreamBoothDataset, moments: dict[PixelsKey, Moments]) -> None:
        self.dataset, self.moments = dataset, moments

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {**self.dataset.labels(index), "moments": self.moments[self.dataset.key(index)]}
        if self.dataset.has_class_images:
            sample["class_moments"] = self.moments[self.dataset.key(index, "class")]
        return sample


class EncodedPairs(Dataset[dict[str, Any]]):
    """The samples of a ControllableDataset with `moments` in the place of pixels, read when their turn comes."""

    def __init__(self, dataset: ControllableDataset, files: dict[Any, Path]) -> None:
        self.dataset, self.files = dataset, files

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        moments = load_file(self.files[self.dataset.key(index)])
        hint = self.dataset.hint(index)
        return {**self.dataset.labels(index), "hint": hint, "moments": (moments["mean"], moments["deviation"])}


class EncoderCache:
    """A folder of what one frozen encoder makes.

    Args:
        root: Where the folders of all encoders lie.
        kind: `latents` or `text`.
        facts: What else the results depend on, for the manifest.
    """

    def __init__(self, root: Path, kind: str, encoder: nn.Module, facts: dict[str, Any]) -> None:
        self.manifest = {"kind": kind, "encoder": fingerprint(encoder), **facts}
        key = hashlib.blake2b(json.dumps(self.manifest, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = root / kind / key

    def fill(
        self, keys: Iterable[Any], encode: Callable[[Any], dict[str, Tensor]], accelerator: Accelerator
    ) -> dict[Any, dict[str, Tensor]]:
        """The results for all keys, which describe inputs and go into JSON: read, or encoded, a share a process."""
        return {key: load_file(path) for key, path in self.make(keys, encode, accelerator).items()}

    def make(
        self, keys: Iterable[Any], encode: Callable[[Any], dict[str, Tensor]], accelerator: Accelerator
    ) -> dict[Any, Path]:
        """The files that hold the results for all keys; those that lack are made, a share a process."""
        wanted = {key: self.folder / f"{_digest(key)}.safetensors" for key in keys}
        missing = [key for key, path in wanted.items() if _read(path) is None]
        accelerator.wait_for_everyone()
        self.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            (self.folder / "manifest.json").write_text(json.dumps(self.manifest, indent=1, sort_keys=True))
        share = missing[accelerator.process_index :: accelerator.num_processes]
        shown = accelerator.is_main_process and bool(share)
        with progress_bar(len(share), f"encoding {self.manifest['kind']}", "file", shown=shown) as bar:
            for key in share:
                partial = partial_of(wanted[key])
                save_file({name: t.to("cpu").contiguous() for name, t in encode(key).items()}, partial)
                partial.replace(wanted[key])
                bar.update()
        accelerator.wait_for_everyone()
        return wanted


def pixels_of_run(dataset: DreamBoothDataset, samples: int) -> dict[PixelsKey, Callable[[], Tensor]]:
    """Every distinct picture among the first `samples` samples of a run, with what renders its pixels."""
    found: dict[PixelsKey, Callable[[], Tensor]] = {}
    for index in range(samples):
        found.setdefault(dataset.key(index), lambda i=index: dataset.pixels(i))
        if dataset.has_class_images:
            found.setdefault(dataset.key(index, "class"), lambda i=index: dataset.pixels(i, "class"))
    return found


def _digest(key: Any) -> str:
    return hashlib.blake2b(json.dumps(key, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """None for a file that is not there or was cut short."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def release(module: nn.Module) -> None:
    """Free a module's memory; its weights are gone."""
    module.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()

"""Latents and text features computed once and kept on disk: training then needs neither VAE nor text encoder.

Of an image the moments of its latents are kept, from which every step samples again. Files are named after what they
were made from: the encoder's weights, and the image's exact pixels or the prompt. Each holds a digest of its tensors;
one whose content has changed is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.photo_dataset import DreamBoothDataset
from ether_diffusion.errors import UserError
from ether_diffusion.files import Digest, short_digest, whole_file, write_whole
from ether_diffusion.input_files import check_file
from ether_diffusion.models.bases import fingerprint
from ether_diffusion.progress import progress_bar

KEPT_IMAGES = 256
"""Images whose moments stay in memory: those of a few photos are read once. 32 KB each at 512 x 512."""


class EncoderCache:
    """A folder with the results of frozen encoders: of a VAE, or of all text encoders of a base.

    Args:
        root: Holds the folders of all encoders.
        kind: `latents` or `text`.
        encode: Description of an input, as JSON can hold it -> tensors by name.
        facts: What else the results depend on, for the manifest.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        encoders: Sequence[nn.Module],
        encode: Callable[[Any], dict[str, Tensor]],
        **facts: Any,
    ) -> None:
        self.encode = encode
        digests = [fingerprint(encoder) for encoder in encoders]
        self.manifest = {"kind": kind, "encoder": digests if digests[1:] else digests[0], **facts}
        self.folder = root / kind / short_digest(json.dumps(self.manifest, sort_keys=True), size=8)

    def fill(self, keys: Iterable[Any], accelerator: Accelerator) -> dict[Any, Path]:
        """The files with the results for all keys. Missing ones are made, each process its share."""
        wanted = {key: self.folder / f"{short_digest(json.dumps(key))}.safetensors" for key in keys}
        missing = [key for key, path in wanted.items() if not _is_whole(path)]
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_whole(self.folder / "manifest.json", json.dumps(self.manifest, indent=1, sort_keys=True))
        share = missing[accelerator.process_index :: accelerator.num_processes]
        shown = accelerator.is_main_process and bool(share)
        with progress_bar(len(share), f"encoding {self.manifest['kind']}", "file", shown=shown) as bar:
            for key in share:
                tensors = {name: tensor.to("cpu").contiguous() for name, tensor in self.encode(key).items()}
                with whole_file(wanted[key], sync=False) as partial:
                    save_file(tensors, partial, metadata={"sha256": _digest(tensors)})
                bar.update()
        accelerator.wait_for_everyone()
        return wanted


class EncodedSamples(Dataset[dict[str, Any]]):
    """Samples with the moments of their images' latents in place of pixels: `moments`, and `class_moments`."""

    def __init__(self, dataset: DreamBoothDataset | ControllableDataset) -> None:
        self.dataset: Any = dataset
        self.files: dict[Any, Path] = {}
        """By the keys of images, with (mean, deviation)."""
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}
        """What was read of them, the earliest first."""

    def first_uses(self, samples: int) -> dict[Any, tuple[int, str]]:
        """For every distinct image of the first `samples` samples: the index and the part of its first use."""
        found: dict[Any, tuple[int, str]] = {}
        for index in range(samples):
            for part, key in self.dataset.keys(index).items():
                found.setdefault(key, (index, part))
        return found

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        moments = {_MOMENTS[part]: self._moments(key) for part, key in self.dataset.keys(index).items()}
        return self.dataset.without_pixels(index) | moments

    def _moments(self, key: Any) -> tuple[Tensor, Tensor]:
        if key not in self._kept:
            if len(self._kept) >= KEPT_IMAGES:
                del self._kept[next(iter(self._kept))]
            found = read_encoded(self.files[key])
            self._kept[key] = found["mean"], found["deviation"]
        return self._kept[key]


_MOMENTS = {"instance": "moments", "class": "class_moments"}


def read_encoded(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of the cache.

    Raises:
        UserError: It is not there, or its content has changed since it was written.
    """
    try:
        with safe_open(check_file(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the command again, which encodes it anew") from None
    if stated != _digest(tensors):
        raise UserError(f"{path}: its content has changed; run the command again, which encodes it anew")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = Digest()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ", tensor.view(torch.uint8).numpy().tobytes())
    return digest.hex()


def _is_whole(path: Path) -> bool:
    """Whether the file is there with the content that was written."""
    try:
        read_encoded(path)
    except UserError:
        return False
    return True

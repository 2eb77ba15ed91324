"""Rendered scenes as arrays on disk, from which every stage of pretraining takes its batches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ether_diffusion.files import make_folder, whole_file
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scenes import SIZE, Scene, sample_scene

SHARD = 2048
FRESH = 10_000_000  # seeds from here on are never trained on

SceneOf = Callable[[int], Scene]


class Pictures:
    """The scenes of seeds `first` … `first + count - 1`, rendered once into `folder` and memory-mapped.

    Args:
        scene_of: Seed -> scene; a function at the top level of a module, so that other processes can call it.
        device: The device of batches.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        scene_of: SceneOf = sample_scene,
        first: int = 0,
        device: str = "cpu",
        workers: int = 2,
    ) -> None:
        self.count, self.first, self.scene_of, self.device = count, first, scene_of, device
        shards = [
            (folder / f"{start:06d}.npy", range(first + start, first + min(start + SHARD, count)), scene_of)
            for start in range(0, count, SHARD)
        ]
        missing = [shard for shard in shards if not _is_current(*shard)]
        make_folder(folder)
        if missing:
            bar = progress_bar(len(shards), "rendering", "shard", initial=len(shards) - len(missing))
            with bar, ProcessPoolExecutor(workers) as pool:
                for _ in pool.map(_render_shard, missing):
                    bar.update()
        self._shards = [np.load(path, mmap_mode="r") for path, _, _ in shards]

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The scene of an index."""
        return self.scene_of(self.first + index)

    def images(self, indices: Tensor) -> Tensor:
        """(B, 3, 64, 64) in ±1."""
        rows = np.stack([self._row(int(k))[..., :3] for k in indices])
        return torch.from_numpy(rows).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1

    def labels(self, indices: Tensor) -> Tensor:
        """(B, 64, 64) label numbers, int64."""
        return torch.from_numpy(np.stack([self._row(int(k))[..., 3] for k in indices])).to(self.device).long()

    def _row(self, index: int) -> np.ndarray:
        return self._shards[index // SHARD][index % SHARD]


def _is_current(path: Path, seeds: range, scene_of: SceneOf) -> bool:
    """Whether the shard is there and its first scene is as the renderer renders it."""
    if not path.is_file():
        return False
    rows = np.load(path, mmap_mode="r")
    image, labels = render(scene_of(seeds[0]))
    return len(rows) == len(seeds) and bool((rows[0] == np.dstack([np.asarray(image), labels])).all())


def _render_shard(shard: tuple[Path, range, SceneOf]) -> None:
    path, seeds, scene_of = shard
    rows = np.empty((len(seeds), SIZE, SIZE, 4), np.uint8)
    for row, seed in zip(rows, seeds, strict=True):
        image, labels = render(scene_of(seed))
        row[..., :3], row[..., 3] = np.asarray(image), labels
    with whole_file(path, sync=False) as partial, partial.open("wb") as file:
        np.save(file, rows)

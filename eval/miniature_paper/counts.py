"""What the segmenter sees in each scene that a method drew: what the miniature paper's paired intervals draw from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ether_diffusion.benchmark.config import BenchmarkConfig, Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.worker import images_folder
from ether_diffusion.data.photos import open_photo
from ether_diffusion.evaluation.map_scores import read_scene
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.files import write_whole
from ether_diffusion.generation import pair_sources
from ether_diffusion.metrics.segmentation import class_counts

BATCH = 25


@dataclass(frozen=True)
class CountsJob:
    """Of a reading of a benchmark, whose images are drawn.

    Attributes:
        told: The benchmark's config, as JSON.
    """

    told: str
    reading: Unit
    file: Path

    def __str__(self) -> str:
        return f"scenes of {self.reading}"

    def do(self) -> None:
        """Write `counts`: by segmenter, (N, 3, C) numbers of pixels, as `class_counts` gives them."""
        plan = Plan(BenchmarkConfig.model_validate_json(self.told))
        part, protocol = plan.part(self.reading.task)
        folder = images_folder(plan, self.reading)
        files = [folder / f"{source.file}.png" for source in pair_sources(plan.scenes, protocol.resolution)]
        scenes = [read_scene(pair, plan.scenes, protocol.resolution) for pair in plan.scenes.pairs]
        labels = np.stack([scene.labels for scene in scenes])
        inputs = {
            "protocol": protocol.digest,
            "images": _digest(file.read_bytes() for file in files),
            "labels": _digest([labels.tobytes()]),
        }
        if self.file.is_file() and json.loads(self.file.read_text(encoding="utf-8"))["inputs"] == inputs:
            return
        names = {metric.judge for metric in protocol.metrics.values() if metric.kind == "segmentation"}
        given = {name: source for name, source in part.judges.items() if name in names}
        judges = load_scorers({name: protocol.judges[name] for name in sorted(names)}, given)
        counts = {}
        for name, judge in judges.items():
            found = []
            for start in range(0, len(files), BATCH):
                images = [open_photo(file) for file in files[start : start + BATCH]]
                seen = judge.network(images)
                found.append(class_counts(seen, labels[start : start + BATCH], judge.network.num_classes))
            counts[name] = torch.cat(found).tolist()
        write_whole(self.file, json.dumps({"inputs": inputs, "counts": counts}) + "\n")


def read_counts(file: Path) -> dict[str, Tensor] | None:
    """What a job wrote, (N, 3, C) int64 by segmenter; None if it did not."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))["counts"]
    return {name: torch.tensor(counts, dtype=torch.int64) for name, counts in found.items()}


def _digest(contents: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for content in contents:
        hashed.update(hashlib.sha256(content).digest())
    return hashed.hexdigest()

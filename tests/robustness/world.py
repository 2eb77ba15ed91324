"""What the bad inputs are made from: a controllable run, its scenes, and results of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, write_ade20k_splits

METRIC = {"value": 0.5, "low": 0.4, "high": 0.6, "higher_is_better": True}
RESULTS = {
    "protocol": "tests/subjects",
    "protocol_digest": "0" * 64,
    "run": {"base_model": "tiny"},
    "judges": {"backbone": {"source": "builtin", "sha256": "1" * 64}},
    "versions": {"ether_diffusion": "0"},
    "counts": {"subjects": 1, "prompts": 1, "images": 1, "expected": 1, "black": 0, "duplicate": 0, "missing": 0},
    "metrics": {"backbone": {**METRIC, "per_subject": {"robot": 0.5}, "per_prompt": {"a {subject}": 0.5}}},
}


def make_world(folder: Path, run: Callable[..., None]) -> None:
    """Make its parts, each in a folder of its name.

    Args:
        run: Runs a command.
    """
    seeds: dict[SplitName, range] = {split: range(first, first + 2) for split, first in FIRST_SEEDS.items()}
    scenes = write_ade20k_splits(folder / "scenes", seeds)
    (folder / "results").mkdir()
    (folder / "results/results.json").write_text(json.dumps(RESULTS))
    small = "training.steps=1 training.batch_size=1 validation.images=0 training.tracker=none training.ema_decay=null"
    small += " training.warmup_steps=0"
    run(
        *("train", "controllable", "--config", "quickstart/controllable", f"data.dataset_dir={scenes}"),
        *(f"output_dir={folder / 'maps'}", *small.split()),
    )

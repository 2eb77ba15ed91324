"""What tests of controllable training share: a few rendered scenes, and configs with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ether_diffusion.config import load_config
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, write_ade20k_splits
from ether_diffusion.training import controllable


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes to train on and two to validate with, in ADE20K's layout."""
    first = FIRST_SEEDS
    seeds: dict[SplitName, range] = {
        "training": range(first["training"], first["training"] + 6),
        "validation": range(first["validation"], first["validation"] + 2),
    }
    return write_ade20k_splits(tmp_path_factory.mktemp("scenes") / "ade20k", seeds)


@pytest.fixture(scope="session")
def make_controllable(scenes: Path) -> Callable[..., controllable.ControllableConfig]:
    """A small controllable config on the miniature: overrides are `section.key=value`."""

    def make(output_dir: Path, *overrides: str) -> controllable.ControllableConfig:
        small = [
            f"output_dir={output_dir}",
            f"data.dataset_dir={scenes}",
            "training.batch_size=1",
            "training.steps=2",
            "training.tracker=none",
            "validation.images=0",
            "validation.sampling.steps=2",
        ]
        return load_config(
            controllable.ControllableConfig, Path(__file__).parent.parent / "controllable.yaml", [*small, *overrides]
        )

    return make

"""What tests share: the real data where it is, and one finished run of the miniature."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ether_diffusion.config import load_config
from ether_diffusion.training import dreambooth

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def seeded() -> None:
    """Draw from the same seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make tiny layers a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos that lies beside a developer's checkout."""
    folder = Path(os.environ.get("ETHER_DIFFUSION_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder}; set ETHER_DIFFUSION_SHARED to its place")
    return folder


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dreambooth.DreamBoothConfig]:
    """A small DreamBooth config on the miniature: overrides are `section.key=value`."""
    cache = tmp_path_factory.mktemp("class_images")

    def make(output_dir: Path, *overrides: str) -> dreambooth.DreamBoothConfig:
        small = [
            f"output_dir={output_dir}",
            f"data.prior.cache_dir={cache}",
            "data.prior.num_images=2",
            "data.prior.sampling.steps=2",
            "training.batch_size=2",
            "training.tracker=none",
            "validation.prompts=[]",
            "validation.sampling.steps=2",
        ]
        return load_config(dreambooth.DreamBoothConfig, ROOT / "tests/dreambooth.yaml", [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def finished_run(make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: ETHER+ on the miniature, six steps, checkpoints every two, one validation prompt."""
    folder = tmp_path_factory.mktemp("run") / "robot"
    dreambooth.run(
        make_config(
            folder,
            "training.steps=6",
            "training.checkpoint_every=2",
            "training.tracker=tensorboard",
            "validation.prompts=[a qwe toy]",
            "validation.every=3",
        )
    )
    return folder

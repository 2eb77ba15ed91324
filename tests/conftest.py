"""What all tests share: one thread a process, caches of their own, real data where it is, and one trained run."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported, and for the processes that tests start: threads that wait for each other on a busy machine
# make tiny layers a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"
# Several workers may start `torch.distributed.run` at once: each picks a free port in the place of 29500.
os.environ["PET_STANDALONE"] = "1"
for name in ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree"):  # which warn on import
    logging.getLogger(name).setLevel(logging.ERROR)

import hypothesis
import pytest

from support.sharing import made_once, session_folder

# torch and the package are imported where they are used: pytest-xdist's controller, which runs no test, does without.
if TYPE_CHECKING:
    from ether_diffusion.training.dreambooth import DreamBoothConfig

ROOT = Path(__file__).resolve().parent.parent
# The same examples in every run, and no time limit for one: a busy machine is no fault. Examples share fixtures.
hypothesis.settings.register_profile(
    "tests",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """The garbage collector takes a third of a second to look through what the imports made, which lives to the end."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Processes that load data ignore SIGTERM: Python would wait for those of an interrupted run that is still held."""
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from the developer's caches, and nothing is left in them."""
    folder = session_folder(tmp_path_factory) / "caches"
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process; a test that fails in bf16 must not hand it to the next one."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Also where a plugin imported torch before OMP_NUM_THREADS was set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def tiny_is_read_once() -> None:
    """Where a test imports what loads it."""
    if "ether_diffusion.models.bases" in sys.modules:
        from support.read_once import read_tiny_once

        read_tiny_once()


@pytest.fixture
def seeded() -> None:
    """Every test draws from the same seed."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos next to a developer's checkout."""
    folder = Path(os.environ.get("ETHER_DIFFUSION_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(
            f"no real photos and published tables, which no repository holds, in {folder} (ETHER_DIFFUSION_SHARED)"
        )
    return folder


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DreamBoothConfig]:
    """A small DreamBooth config on the miniature: overrides are `section.key=value`."""
    from ether_diffusion.config import load_config
    from ether_diffusion.training.dreambooth_config import DreamBoothConfig

    cache = tmp_path_factory.mktemp("class_images")

    def make(output_dir: Path, *overrides: str) -> DreamBoothConfig:
        small = [
            f"output_dir={output_dir}",
            f"data.prior.cache_dir={cache}",
            "data.prior.num_images=2",
            "data.prior.sampling.steps=2",
            "training.batch_size=1",
            "training.tracker=none",
            "validation.prompts=[]",
            "validation.images_per_prompt=1",
            "validation.sampling.steps=2",
        ]
        return load_config(DreamBoothConfig, ROOT / "tests/dreambooth.yaml", [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def finished_run(make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: ETHER+ on the miniature, six steps, checkpoints every two, one validation prompt."""
    from ether_diffusion.training import dreambooth

    settings = (
        "training.batch_size=2",
        "training.steps=6",
        "training.checkpoint_every=2",
        "training.tracker=tensorboard",
        "validation.prompts=[a qwe toy]",
        "validation.every=3",
    )
    return made_once(tmp_path_factory, "robot", lambda folder: dreambooth.run(make_config(folder, *settings)))

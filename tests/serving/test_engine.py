"""The engine and its queue: which requests share a pass, and that each image is its own adapter's."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.serving.catalogue import open_catalogue
from ether_diffusion.serving.engine import Engine, Sampled
from ether_diffusion.serving.engine_queue import EngineQueue
from ether_diffusion.serving.image_requests import Failure, Images, ImagesRequest
from ether_diffusion.serving.serve_settings import ServeSettings
from support.saved_adapters import save_run, save_runs

SAMPLING = Sampling(steps=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ETHER adapters, one ETHER+ and one LoRA."""
    root = tmp_path_factory.mktemp("adapters")
    save_runs(root, ("cat", "robot"), "ether")
    save_run(root / "plus")
    save_run(root / "lora", "lora")
    return root


@pytest.fixture(scope="module")
def engine(runs: Path) -> Engine:
    settings = ServeSettings(base="tiny", adapters=runs, device="cpu", batch_size=2, capacity=2)
    return Engine(settings, open_catalogue(settings))


def request(adapter: str | None, seed: int = 0, **values: Any) -> ImagesRequest:
    return ImagesRequest(
        **{"prompt": "a red ball", "adapter": adapter, "seed": seed, "size": (64, 64), "sampling": SAMPLING, **values}
    )


def alone(folder: Path | None, asked: ImagesRequest) -> list[np.ndarray]:
    """The images that `generate` makes of a request."""
    pipeline, _ = load_pipeline(base_model="tiny", device="cpu")
    if folder is not None:
        load_adapter(pipeline.unet, folder)
    jobs = jobs_for([asked.prompt], asked.num_images)
    return [pixels(image) for _, image in sample_images(pipeline, jobs, asked.sampling, seed=asked.seed)]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_each_request_has_the_images_of_its_own_adapter(engine: Engine, runs: Path) -> None:
    asked = [
        request("cat"),
        request("robot", num_images=2),
        request(None),
        request("lora"),
        request("plus"),
        request("nothing"),
        request("robot", sampling=Sampling(steps=2, scheduler="euler")),
    ]
    outcomes = engine.sample(asked)
    for one, outcome in zip(asked, outcomes, strict=True):
        if one.adapter in ("lora", "nothing"):
            assert isinstance(outcome, Failure)
            assert outcome.status == 404
            continue
        assert isinstance(outcome, Sampled)
        expected = alone(None if one.adapter is None else runs / one.adapter, one)
        for image, right in zip(outcome.images, expected, strict=True):
            assert np.abs(pixels(image) - right).max() <= 1
    # In parts of two, which the bank holds: [cat, robot robot], of which a pass has two; [the base, plus]; …
    assert [one.images for outcome in outcomes if isinstance(outcome, Sampled) for one in outcome.passes] == [
        2,
        1,
        1,
        1,
        1,
    ]


def test_an_adapter_that_is_replaced_is_read_again(engine: Engine, runs: Path) -> None:
    shutil.copytree(runs / "cat", runs / "mine")
    (first,) = engine.sample([request("mine")])
    shutil.rmtree(runs / "mine")
    shutil.copytree(runs / "robot", runs / "mine")
    (second,) = engine.sample([request("mine")])
    shutil.rmtree(runs / "mine")
    (third,) = engine.sample([request("mine")])
    (cat, robot) = engine.sample([request("cat"), request("robot")])
    for one, other in ((first, cat), (second, robot)):
        assert isinstance(one, Sampled)
        assert isinstance(other, Sampled)
        assert np.abs(pixels(one.images[0]) - pixels(other.images[0])).max() <= 1
    assert isinstance(third, Failure)


def test_a_damaged_adapter_fails_alone(engine: Engine, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "cat", runs / "broken")
    (runs / "broken/adapter/adapter_model.safetensors").write_bytes(b"nothing")
    broken, right = engine.sample([request("broken"), request("cat")])
    shutil.rmtree(runs / "broken")
    assert isinstance(broken, Failure)
    assert (broken.status, broken.code) == (404, "model_unusable")
    assert str(runs) not in broken.message
    assert isinstance(right, Sampled)
    assert "is not served: " in capsys.readouterr().err


class SlowEngine:
    """Records the batches that it gets."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(batch_size=4, batch_wait=0.02)
        self.batches: list[list[str]] = []
        self.fails = False

    def sample(self, requests: Sequence[ImagesRequest]) -> list[Sampled | Failure]:
        self.batches.append([one.prompt for one in requests])
        time.sleep(0.05)
        if self.fails:
            raise RuntimeError("a fault")
        return [Failure(200, one.prompt, "") for one in requests]

    def encode(self, outcome: Any) -> Images | Failure:
        return outcome


def queued(test: Any) -> None:
    async def run() -> None:
        engine: Any = SlowEngine()
        queue = EngineQueue(engine)
        async with queue.closing():
            await asyncio.wait_for(test(engine, queue), 10)

    asyncio.run(run())


def test_requests_of_a_group_share_passes_in_their_order() -> None:
    other = Sampling(steps=7)

    async def check(engine: SlowEngine, queue: EngineQueue) -> None:
        asked = [
            request("a", prompt="1"),
            request("b", prompt="2", sampling=other),
            request("c", prompt="3", num_images=2),
            request("d", prompt="4", num_images=2),
            request("e", prompt="5"),
            request("f", prompt="6", num_images=9),
        ]
        outcomes = await asyncio.gather(*map(queue.generate, asked))
        assert [outcome.message for outcome in outcomes if isinstance(outcome, Failure)] == list("123456")
        assert engine.batches == [["1", "3"], ["2"], ["4", "5"], ["6"]]

    queued(check)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def check(engine: SlowEngine, queue: EngineQueue) -> None:
        first = asyncio.create_task(queue.generate(request("a", prompt="1", num_images=4)))
        second = asyncio.create_task(queue.generate(request("a", prompt="2")))
        third = asyncio.create_task(queue.generate(request("a", prompt="3")))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(first, third)
        assert engine.batches == [["1"], ["3"]]

    queued(check)


def test_a_fault_of_a_pass_is_answered_and_the_next_one_runs() -> None:
    async def check(engine: SlowEngine, queue: EngineQueue) -> None:
        engine.fails = True
        outcome = await queue.generate(request("a"))
        assert isinstance(outcome, Failure)
        assert (outcome.status, outcome.code) == (500, "internal_error")
        engine.fails = False
        assert await queue.is_ready()
        outcome = await queue.generate(request("a", prompt="again"))
        assert isinstance(outcome, Failure)
        assert outcome.message == "again"

    queued(check)

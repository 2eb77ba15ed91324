"""Faults outside of the maths: NaN and black images, devices without float64, spawned workers, other threads."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ether_diffusion.errors import TrainingFailed
from ether_diffusion.generation import Sampling, fault, generate, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion.pictures import read_settings
from ether_diffusion.training import dreambooth
from ether_diffusion.training.loop import Trainer
from ether_diffusion_cli import main
from support.runs import assert_same_run
from support.tasks import make_task

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


class NoFloat64(TorchDispatchMode):
    """A device without double precision, such as Apple's MPS: every operation that makes a float64 tensor fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(made)):
            raise TypeError(f"{func} made a float64 tensor")
        return made


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose UNet has one weight that is NaN."""
    base = load_base("tiny")
    with torch.no_grad():
        base.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    folder = tmp_path_factory.mktemp("broken")
    base.pipeline().save_pretrained(folder)
    return folder


def test_an_error_leaves_no_workers_for_which_the_process_would_wait(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ignore SIGTERM, by which Python ends such processes when it exits, and whose end it then waits for."""

    def fail(self: Any, batch: Any) -> None:
        assert len(multiprocessing.active_children()) >= 2
        raise LookupError("a fault")

    monkeypatch.setattr(dreambooth.DreamBoothTask, "prepare", fail)
    before = multiprocessing.active_children()
    with pytest.raises(LookupError) as caught:
        dreambooth.run(make_config(tmp_path / "run", "data.prior=null", "training.workers=2"))
    assert caught.traceback  # which holds the frames
    assert multiprocessing.active_children() == before


def test_training_and_sampling_make_no_float64(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="made a float64"), NoFloat64():
        torch.zeros(1, dtype=torch.float64)
    options = ("training.min_snr_gamma=5", "training.noise_offset=0.1", "training.ema_decay=0.9", "training.steps=1")
    with NoFloat64():
        dreambooth.run(make_config(tmp_path / "run", *options, "training.batch_size=1", "data.prior.num_images=1"))
        pipeline, _ = load_pipeline(tmp_path / "run")
        list(sample_images(pipeline, jobs_for(["a qwe toy"], 1), Sampling(steps=2), seed=0))


def test_workers_get_no_model(make_config: MakeConfig, tmp_path: Path) -> None:
    task = make_task(make_config, tmp_path / "run")
    sent = pickle.dumps((task.dataset, task.collate))  # as for a spawned worker on macOS
    weights = sum(p.numel() * p.element_size() for p in task.module.parameters())
    assert len(sent) < weights / 10
    dataset, collate = pickle.loads(sent)
    batch = collate([dataset[0], dataset[1]])
    assert torch.equal(batch["pixel_values"][1], task.dataset[1]["pixel_values"])


def test_nan_black_and_faultless_images_are_distinguished(broken: Path) -> None:
    jobs = jobs_for(["a toy"], 1)
    faults = []
    for base in (str(broken), "tiny"):
        pipeline, _ = load_pipeline(base_model=base)
        ((_, image),) = sample_images(pipeline, jobs, Sampling(steps=1), seed=0)
        faults.append(fault(image))
    assert faults == ["nan", None]
    assert fault(Image.new("RGB", (8, 8))) == "black"


def test_generate_reports_nan_images_and_reports_them_again_on_a_rerun(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--base-model", str(broken), "--prompt", "a toy", "--num-images", "2", "--steps", "1"]
    for _ in range(2):  # the second time the files are kept
        assert main([*arguments, "--output", str(tmp_path)]) == 0
        printed = capsys.readouterr().err
        assert "ether-diffusion: of 2 images 2 NaN and 0 black; images.jsonl says which. Try --dtype fp32." in printed
        rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
        assert [row["fault"] for row in rows] == ["nan", "nan"]
        settings = read_settings(tmp_path / rows[0]["file"])
        assert settings is not None
        assert settings["fault"] == "nan"


def test_an_image_without_fault_has_no_entry_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(load_pipeline(base_model="tiny")[0], ["a toy"], tmp_path, sampling=Sampling(steps=1))
    assert "fault" not in (tmp_path / "images.jsonl").read_text()


def test_validation_counts_nan_and_black(
    broken: Path, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        tmp_path / "run",
        f"base_model={broken}",
        "data.prior=null",
        "training.steps=1",
        "validation.prompts=[a qwe toy]",
        "validation.images_per_prompt=2",
        "validation.sampling.steps=1",
    )
    with pytest.raises(TrainingFailed, match="The loss is nan at step 1"):
        dreambooth.run(config)
    assert "Step 0: 2 validation images are NaN, 0 are black." in capsys.readouterr().out


def test_class_images_that_are_nan_are_reported(
    broken: Path, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (f"base_model={broken}", f"data.prior.cache_dir={tmp_path / 'class'}", "training.steps=1")
    with pytest.raises(TrainingFailed):
        dreambooth.run(make_config(tmp_path / "run", *overrides))
    assert "2 of the 2 class images in" in capsys.readouterr().out


def test_a_run_trains_in_a_thread_that_is_not_the_main_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """As in a server. Signals belong to the main thread, whose handlers stay; the numbers are the same."""
    settings = ("data.prior=null", "training.batch_size=1", "training.steps=2")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(dreambooth.run, make_config(tmp_path / "thread", *settings)).result()
    assert report.steps_taken == 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    dreambooth.run(make_config(tmp_path / "main", *settings))
    assert_same_run(tmp_path / "thread", tmp_path / "main", "step-000002")


def test_running_out_of_memory_on_mps_gives_the_same_hint_as_on_cuda(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPS raises a plain RuntimeError, with this text from torch's MPSAllocator.mm."""

    def full(*_: Any) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 0 bytes).")

    monkeypatch.setattr(Trainer, "_step", full)
    with pytest.raises(TrainingFailed, match=r"Out of memory \(MPS backend .*Try training\.gradient_checkpointing"):
        dreambooth.run(make_config(tmp_path / "run", "data.prior=null", "training.steps=1"))

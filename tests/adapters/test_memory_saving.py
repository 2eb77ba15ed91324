"""Generating with an adapter in less memory, by offloading, slicing and tiling, changes no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images

JOBS = jobs_for(["a qwe toy"], 2)


def images(pipeline: Any) -> np.ndarray:
    sampled = sample_images(pipeline, JOBS, Sampling(steps=2), seed=3, batch_size=2)
    return np.stack([np.asarray(image).astype(int) for _, image in sampled])


@pytest.fixture(scope="module")
def expected(finished_run: Path) -> np.ndarray:
    adapted, base = (images(load_pipeline(run, base_model="tiny")[0]) for run in (finished_run, None))
    assert np.abs(adapted - base).max() > 1
    return adapted


def offload_layers(pipeline: Any) -> None:
    # As `enable_sequential_cpu_offload` does it. That one fails with "cpu:0", with or without an adapter.
    for part in (pipeline.unet, pipeline.vae):
        accelerate.cpu_offload(part, torch.device("cpu"))


@pytest.mark.parametrize(
    "save_memory",
    [
        lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
        offload_layers,
        lambda pipeline: pipeline.enable_attention_slicing(),
        lambda pipeline: (pipeline.vae.enable_slicing(), pipeline.vae.enable_tiling()),
    ],
    ids=["model offload", "sequential offload", "attention slicing", "VAE slicing and tiling"],
)
def test_saving_memory_changes_no_image(finished_run: Path, expected: np.ndarray, save_memory: Any) -> None:
    """diffusers offloads from any device; with the CPU its hooks are the same, and no memory is saved."""
    pipeline, _ = load_pipeline(finished_run)
    save_memory(pipeline)
    assert np.abs(images(pipeline) - expected).max() <= 1


def test_offloading_that_is_impossible_is_refused_in_one_line(finished_run: Path) -> None:
    for offload in ("model", "sequential"):
        with pytest.raises(UserError, match=f"--offload {offload} .* the device is the CPU already"):
            load_pipeline(finished_run, device="cpu", offload=offload)
    with pytest.raises(UserError, match=r"--offload sequential and --quantization exclude each other"):
        load_pipeline(finished_run, quantization="torchao_int8", offload="sequential")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves parts between a GPU and the CPU")
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_pipelines_give_the_images_of_the_gpu(finished_run: Path, offload: Any) -> None:
    on_gpu, offloaded = (images(load_pipeline(finished_run, dtype="fp32", offload=way)[0]) for way in ("none", offload))
    assert np.abs(offloaded - on_gpu).max() <= 1

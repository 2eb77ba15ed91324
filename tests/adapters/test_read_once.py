"""A run is read once: pipelines are made of what was read, and nothing of an adapter is opened again."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import merge_saved
from ether_diffusion.adapters.saved_adapter import read_adapter, read_previous_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, read_run, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion_cli import main
from support.adapted_unets import move, settings_of

WEIGHTS = "adapter_model.safetensors"
_opened: Counter[Path] = Counter()
_counting = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting and event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).name == WEIGHTS:
        _opened[Path(arguments[0]).resolve()] += 1


sys.addaudithook(_audit)  # it cannot be removed; it sees what Python opens


@pytest.fixture
def opened() -> Iterator[Counter[Path]]:
    """How often Python opens each file of an adapter's weights.

    safetensors opens files by itself, unseen; that this is not done is what the test of a deleted folder shows.
    """
    global _counting
    _opened.clear()
    _counting = True
    yield _opened
    _counting = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Magnitudes after LoRA, each with a part for the text encoder: four files of weights."""
    root = tmp_path_factory.mktemp("adapters")
    for name, method in (("first", "lora"), ("second", "magnitude")):
        base = load_base("tiny")
        if name == "second":
            previous = read_previous_adapter(root / "first")
            merge_saved(base.unet, previous)
            merge_saved(base.text_encoder, previous, text_encoder=True)
        attach(base.unet, settings_of(method))
        attach(base.text_encoder, settings_of(method).for_text_encoder())
        move(base.unet)
        move(base.text_encoder)
        save_adapter(base.unet, root / name, base_model="tiny", text_encoder=base.text_encoder)
    return root / "second"


def files_of(folder: Path) -> set[Path]:
    return {path.resolve() for path in folder.rglob(WEIGHTS)}


def image(run: Any, **options: Any) -> np.ndarray:
    pipeline, _ = load_pipeline(run, **options)
    ((_, image),) = sample_images(pipeline, jobs_for(["a toy"], 1), Sampling(steps=2), seed=0)
    return np.asarray(image).astype(int)


def test_a_pipeline_opens_each_file_of_weights_once(folder: Path, opened: Counter[Path]) -> None:
    load_pipeline(folder)
    assert len(files_of(folder)) == 4
    assert opened == dict.fromkeys(files_of(folder), 1)


def test_the_command_opens_each_file_of_weights_once(folder: Path, tmp_path: Path, opened: Counter[Path]) -> None:
    command = ["generate", "--adapter", str(folder), "--prompt", "a toy", "--steps", "1", "--output", str(tmp_path)]
    assert main(command) == 0
    assert opened == dict.fromkeys(files_of(folder), 1)


def test_a_run_that_was_read_does_not_need_its_folder(folder: Path, tmp_path: Path) -> None:
    """One `SavedRun` makes any number of pipelines, which are those of the folder."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    run = read_run(copy)
    shutil.rmtree(copy)
    expected = image(folder)
    assert np.abs(expected - image(None, base_model="tiny")).max() > 1
    for _ in range(2):
        assert np.array_equal(image(run), expected)
    assert np.abs(image(run, merged=True) - expected).max() <= 1
    assert run.trained.digest == read_adapter(folder).digest


def test_an_adapter_before_is_saved_again_from_memory(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    pipeline, _ = load_pipeline(copy)
    shutil.rmtree(copy)
    again = save_adapter(pipeline.unet, tmp_path / "again", base_model="tiny", text_encoder=pipeline.text_encoder)
    for path in (folder / "before").rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert read_adapter(again).digest == read_adapter(folder).digest

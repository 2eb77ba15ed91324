"""A random base of each family, saved in diffusers' layout and loaded again, once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from ether_diffusion.models.bases import Base, load_base
from support.pipelines import pipeline


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline."""
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def save(name: str) -> Path:
        folder = root / name.replace(" ", "_")
        pipeline(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def base_of(folder_of: Callable[[str], Path]) -> Callable[[str], Base]:
    """A base of a family, of which each test has its own."""
    return lambda name: load_base(str(folder_of(name)))

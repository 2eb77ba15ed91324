"""Shared by the tests of data: a few scenes of the miniature in ADE20K's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ether_diffusion.tinyworld.layouts import write_ade20k_splits


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training scenes and four for validation. Read-only: `ade20k` is a copy to change."""
    seeds = {"training": range(3, 9), "validation": range(20, 24)}
    return write_ade20k_splits(tmp_path_factory.mktemp("scenes") / "tiny_ade", seeds)  # pyright: ignore


@pytest.fixture
def ade20k(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "ade"))

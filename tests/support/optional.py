"""What a test needs and may be missing: a package of an extra, or transformers' image processors under their names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

EXTRAS = {"bitsandbytes": "dev", "torchao": "dev", "ray": "dev", "deepspeed": "sharding"}
"""The extra of pyproject.toml that installs a package. Triton comes with torch, but for Linux alone."""


def needs(module: str) -> Any:
    """The module, or the test is skipped with what installs it."""
    package = module.partition(".")[0]
    how = f"pip install -e '.[{EXTRAS[package]}]'" if package in EXTRAS else "torch has it on Linux alone"
    return pytest.importorskip(module, reason=f"{package} is not installed: {how}")


def pil_processor(model: str, name: str) -> Any:
    """transformers' processor that resizes with Pillow: `SegformerImageProcessorPil`, in 5.0 without `Pil`."""
    folder = f"transformers.models.{model}.image_processing_"
    try:
        return getattr(importlib.import_module(f"{folder}pil_{model}"), f"{name}Pil")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"{folder}{model}"), name)

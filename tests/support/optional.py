"""A package that a test needs, and that may be missing: the test is skipped with what installs it."""

from __future__ import annotations

from typing import Any

import pytest

EXTRAS = {"bitsandbytes": "dev", "torchao": "dev", "ray": "dev", "deepspeed": "sharding"}
EXTRAS |= dict.fromkeys(("fastapi", "openai", "prometheus_client", "uvicorn"), "dev")
"""The extra of pyproject.toml that installs a package. Triton comes with torch, but for Linux alone."""


def needs(module: str) -> Any:
    """The module, or the test is skipped with what installs it."""
    package = module.partition(".")[0]
    how = f"pip install -e '.[{EXTRAS[package]}]'" if package in EXTRAS else "torch has it on Linux alone"
    return pytest.importorskip(module, reason=f"{package} is not installed: {how}")

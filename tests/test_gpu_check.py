"""The script for a GPU runs: rehearsed on the CPU, with a small UNet and interpreted kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu_with_a_small_unet() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--minutes", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "FAILED" not in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for words in ("bitwise equal", "changes nothing", "compiled, ether_plus", "ether_plus, merged"):
        assert words in done.stdout, words

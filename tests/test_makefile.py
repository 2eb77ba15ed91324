"""The Makefile: what each target installs, and whose environment it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def environment(folder: Path, checkout: Path) -> Path:
    """A virtual environment as far as the Makefile looks: with an editable install of a checkout."""
    record = folder / "lib/python3.11/site-packages/ether_diffusion-0.1.0.dist-info/direct_url.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}}))
    return folder


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "test-slow", "bench"])
def test_another_checkouts_environment_is_refused_before_anything_is_installed(tmp_path: Path, target: str) -> None:
    venv = environment(tmp_path / "venv", tmp_path / "a first clone")
    done = make(target, f"VENV={venv}")
    assert done.returncode == 2
    assert f"VENV={venv}: it belongs to the checkout {tmp_path / 'a first clone'}, not to {ROOT}." in done.stderr
    assert "Installing" not in done.stdout
    assert sorted(path.name for path in venv.iterdir()) == ["lib"]


@pytest.mark.parametrize("owner", [ROOT, None])
def test_ones_own_environment_and_a_missing_one_are_accepted(tmp_path: Path, owner: Path | None) -> None:
    venv = environment(tmp_path / "venv", owner) if owner else tmp_path / "venv"
    assert make("check-venv", f"VENV={venv}").returncode == 0


@pytest.mark.parametrize(
    ("target", "tools"), [("quickstart", False), ("quickstart-controllable", False), ("test", True)]
)
def test_the_quickstarts_install_the_runtime_alone(tmp_path: Path, target: str, tools: bool) -> None:
    plan = make("--dry-run", target, f"VENV={tmp_path / 'venv'}").stdout
    assert "--editable .\n" in plan
    assert ("--editable '.[dev]'" in plan) == tools

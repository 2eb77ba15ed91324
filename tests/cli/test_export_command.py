"""`export`, `inspect` of what it writes, and `doctor`, as a user runs them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion_cli import doctor
from ether_diffusion_cli.main import main


def test_an_exported_run_is_inspected(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mug.safetensors"
    assert main(["export", str(finished_run), "--output", str(file), "--dtype", "fp32"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("56 layers of rank 4; they change the weights by ")
    assert printed[-1] == str(file)
    assert main(["inspect", str(file), "--base", "tiny"]) == 0
    theirs = capsys.readouterr().out
    assert main(["inspect", str(finished_run), "--base", "tiny"]) == 0
    ours = capsys.readouterr().out
    for text in (ours, theirs):
        assert "of the weight's norm a layer" in text
    assert _row(ours, "strength") == _row(theirs, "strength")
    assert _row(ours, "sha256") == _row(theirs, "ether_diffusion.adapter_digest")
    assert (_row(theirs, "method"), _row(theirs, "keys"), _row(theirs, "rank")) == ("LoRA", "kohya", "4")
    assert main(["export", str(finished_run), "--output", str(file)]) == 2
    assert capsys.readouterr().err == f"ether-diffusion: --output {file} exists; choose another name, or remove it.\n"


def test_a_machine_that_can_train_is_found_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--base", "tiny", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["text"] == importlib.metadata.version("torch")
    assert findings["base"] == {"name": "base", "state": "ok", "text": "tiny"}
    assert {finding["state"] for finding in findings.values()} <= {"ok", "note"}


@pytest.mark.parametrize(
    ("needed", "fault"), [("torch>=99", "torch"), ("a-package-that-nobody-has", "a-package-that-nobody-has")]
)
def test_what_would_keep_training_from_starting_is_a_fault(
    needed: str, fault: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [needed])
    assert main(["doctor", "--base", "tiny"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"ether-diffusion: training could not start here: {fault}.\n"
    assert f"fault {fault}" in printed.out


def test_a_base_that_is_not_there_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--base", "./nowhere"]) == 2
    assert "fault base" in capsys.readouterr().out


def _row(text: str, name: str) -> str:
    return next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} "))

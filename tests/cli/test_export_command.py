"""`export`, `inspect` of what it writes, and `doctor`, as a user runs them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
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


def test_a_package_that_cannot_be_imported_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wand_of_no_use.py").write_text("raise OSError('libwand.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "OPTIONAL", {"wand_of_no_use": "magic", "a_package_that_nobody_has": "anything"})
    assert main(["doctor", "--base", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "cannot be imported (OSError: libwand.so: cannot open shared object file): no magic" in printed
    assert "not installed: no anything" in printed


def test_whether_a_base_of_the_hub_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, none of it, or the half that a broken download left; without the network the last two are faults."""
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--base/snapshots/0123"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs/main").write_text("0123")

    def base(offline: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        code = main(["doctor", "--base", "some/base"])
        return code, next(line for line in capsys.readouterr().out.splitlines() if " base " in line)

    assert base()[0] == 0
    assert "is not in the cache: the first training downloads it" in base()[1]
    for file in doctor.BASE_FILES[:2]:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).touch()
    assert "is in the cache without vae/diffusion_pytorch_model.safetensors" in base()[1]
    assert base(offline=True)[0] == 2
    for file in doctor.BASE_FILES[2:]:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).touch()
    code, line = base(offline=True)
    assert (code, line.startswith("ok")) == (0, True)


def _row(text: str, name: str) -> str:
    return next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} "))

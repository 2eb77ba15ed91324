"""Controllable training from the command line: over two processes, with a sharded base, and with bad input."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.training import controllable
from support.runs import difference

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
FSDP = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml", "--mixed_precision", "no"]
COMMON = [
    "training.steps=3",
    "training.warmup_steps=2",
    "training.tracker=none",
    "training.ema_decay=0.5",
    "data.crop=random",
    "data.horizontal_flip=true",
    "data.caption_dropout=0.3",
    "validation.images=1",
    "validation.every=3",
    "validation.sampling.steps=2",
]
FILES = ["adapter/adapter_model.safetensors", "condition_encoder/diffusion_pytorch_model.safetensors"]


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TWO_PROCESSES, [*FSDP, "--main_process_port", "0"]], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_with_the_same_effective_batch(
    make_controllable: Callable[..., controllable.ControllableConfig],
    scenes: Path,
    tmp_path: Path,
    launcher: list[str],
) -> None:
    """gloo on the CPU: the same samples and rates, so the same run up to the order of sums."""
    script = ["train_controllable.py", "--config", "tests/controllable.yaml", f"data.dataset_dir={scenes}"]
    done = call(*launcher, *script, *COMMON, "training.batch_size=1", f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert "3 with 2 samples each" in done.stdout
    controllable.run(make_controllable(tmp_path / "one", *COMMON, "training.batch_size=2"))
    for file in FILES:
        assert difference(tmp_path / "two" / file, tmp_path / "one" / file) < 1e-4
    assert (tmp_path / "two/samples/step-000003.png").is_file()
    two, one = (read_adapter(tmp_path / name / "adapter").certificate for name in ("two", "one"))
    assert two is not None
    assert one is not None
    assert (two.faults, two.measured["layers"], two.measured["steps"]) == ({}, one.measured["layers"], 3)
    assert two.measured["largest_change"] == pytest.approx(one.measured["largest_change"], rel=1e-3)


def test_an_error_of_the_script_is_its_exit_code_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `train_dreambooth.py` in a process of its own: see tests/cli."""
    script = ["train_controllable.py", "--config", "quickstart/controllable", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", [*script, "--conditioning_image_column=map"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "train_controllable.py: command line: --conditioning_image_column=map: unknown option; "
        "here it is data.condition=map"
    ]
    assert not (tmp_path / "run").exists()

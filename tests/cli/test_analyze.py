"""`ether-diffusion analyze` and `grid`: what they record is the command that was typed."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.benchmark.runner import Outcome
from ether_diffusion_cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_recorded_command_is_the_one_that_was_typed(finished_run: Path, tmp_path: Path) -> None:
    arguments = ["analyze", "geometry", str(finished_run), "--output", str(tmp_path / "a folder")]
    assert main(arguments) == 0
    recorded = (tmp_path / "a folder/command.txt").read_text().strip()
    assert shlex.split(recorded) == ["ether-diffusion", *arguments]


def test_a_grid_records_its_command_without_the_share_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By command and by script: every worker writes the same."""
    recorded = []

    def run_grid(config: Any, command: str, *_: object) -> tuple[Outcome, list[Path]]:
        recorded.append(command)
        return Outcome(), []

    monkeypatch.setattr("ether_diffusion.benchmark.grid_report.run_grid", run_grid)
    line = ["--config", "benchmark/rates_tinyworld", "threads=1", "--shard", "2/3"]
    assert main(["grid", *line]) == 0
    monkeypatch.setattr(sys, "argv", ["eval/grid.py", *line])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "eval/grid.py"), run_name="__main__")
    setting = "--config benchmark/rates_tinyworld threads=1"
    assert recorded == [f"ether-diffusion grid {setting}", f"python eval/grid.py {setting}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cost unett", "'unett': no such model. Did you mean 'unet'? Expected phi, llama, unet."),
        ("cost unet --latents 60", "--latents 60: expected a multiple of 8, at most 4,096."),
        ("perturbation --base-model other", "--base-model other: a base other than tiny needs --prompts FILE."),
        ("energy nowhere", "nowhere"),
    ],
)
def test_faults_are_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_the_options_know_the_analyses_defaults() -> None:
    """`--help` imports nothing, so that a few values stand twice."""
    from ether_diffusion.analysis import cost_report, energy, perturbation
    from ether_diffusion.models.bases import TINY
    from ether_diffusion.tinyworld import figures
    from ether_diffusion_cli import analyze

    assert analyze.CHUNK == energy.CHUNK
    assert analyze.TOKENS == cost_report.TOKENS
    assert tuple(perturbation.PERTURBATIONS) == analyze.METHODS
    assert (analyze.TINY, analyze.GUIDANCE) == (TINY, figures.GUIDANCE)

"""What analyses leave behind: tables, plots that name their command, and the scripts that write them."""

from __future__ import annotations

import csv
import math
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ether_diffusion.analysis import plots
from ether_diffusion.analysis.output import command_line, plot, write_table
from ether_diffusion.analysis.runs import analysed_runs
from ether_diffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_holds_numbers_and_empty_cells(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "x": 1 / 3, "n": 2, "y": math.nan}, {"name": "c", "x": 1e-17, "n": 3, "y": None}]
    path = write_table(tmp_path / "new/table.csv", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == ["a, b", "c"]
    assert [float(row["x"]) for row in found] == pytest.approx([1 / 3, 1e-17], rel=1e-9)
    assert [row["y"] for row in found] == ["", ""]


def test_plots_name_their_command_and_are_the_same_bytes_when_made_again(tmp_path: Path) -> None:
    command = command_line("eval/geometry.py", ["a run", "--output", "x"])
    assert shlex.split(command) == ["python", "eval/geometry.py", "a run", "--output", "x"]
    for name in ("first", "second"):
        with plot(tmp_path / name, command, size=(3, 2)) as (axes,):
            axes.plot([1, 2], [3, 4], label="x")
            axes.legend()
    assert Image.open(tmp_path / "first.png").text["Description"] == command  # pyright: ignore
    assert command in (tmp_path / "first.svg").read_text()
    for kind in ("png", "svg"):
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_plot_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), plot(tmp_path / "plot", "command"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_averaged_and_unknown_numbers_left_out() -> None:
    rows = [{"x": 2.0, "y": 1.0}, {"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 3.0}, {"x": 3.0, "y": math.nan}]
    assert plots.curve(rows, "x", "y") == ([1.0, 2.0], [5.0, 2.0])


def run_script(name: str, *arguments: object) -> int:
    """A script of eval/ as a command, in this process."""
    argv, sys.argv = sys.argv, [f"eval/{name}.py", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"eval/{name}.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return int(ended.value.code or 0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_geometry_of_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("geometry", finished_run, "--output", tmp_path) == 0
    (row,), layers = read(tmp_path / "geometry.csv"), read(tmp_path / "layers.csv")
    assert (row["run"], row["method"], row["base_model"], int(row["layers"])) == (
        "robot",
        "ETHER+",
        "tiny",
        len(layers),
    )
    distances = [float(layer[f"transform_{side}"]) for layer in layers for side in ("in", "out")]
    assert float(row["transform"]) == pytest.approx(sum(distances) / len(distances))
    assert 0 < min(distances) <= max(distances) <= math.sqrt(2)
    command = (tmp_path / "command.txt").read_text()
    assert shlex.split(command)[1:3] == ["eval/geometry.py", str(finished_run)]
    for plot_name in ("geometry", "layers"):
        assert {path.suffix for path in tmp_path.glob(f"{plot_name}.[ps][nv]g")} == {".png", ".svg"}
    assert "robot" in capsys.readouterr().out


def test_energy_over_a_runs_checkpoints(finished_run: Path, tmp_path: Path) -> None:
    assert run_script("energy", finished_run, "--output", tmp_path) == 0
    rows = read(tmp_path / "energy.csv")
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
    assert float(rows[0]["mean_change"]) == 0
    assert all(float(row["mean_change"]) != 0 for row in rows[1:])
    layers = [row for row in read(tmp_path / "layers.csv") if row["step"] == "6"]
    by_hand = sum(float(row["change"]) / int(row["pairs"]) for row in layers)
    assert float(rows[-1]["mean_change"]) == pytest.approx(by_hand, rel=1e-6)
    assert (tmp_path / "energy.png").is_file()
    assert (tmp_path / "energy.svg").is_file()


def test_perturbations_of_the_miniature(tmp_path: Path) -> None:
    small = [
        "--count",
        1,
        "--steps",
        1,
        "--distances",
        1,
        "--target",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    assert run_script("perturbation", *small, "--output", tmp_path) == 0
    rows = read(tmp_path / "perturbation.csv")
    assert [(row["method"], float(row["distance"])) for row in rows] == [
        ("base", 0),
        ("OFT", 1),
        ("ETHER", 2),
        ("ETHER+", 1),
        ("ETHER+", pytest.approx(math.sqrt(2))),
    ]
    assert float(rows[0]["pixels"]) == 0
    assert all(0 < float(row["pixels"]) < 1 for row in rows[1:])
    assert all(0 <= float(row["recognised"]) <= 1 for row in rows)
    assert {path.name for path in tmp_path.glob("*.?[nv]g")} == {
        f"{name}.{kind}" for name in ("grid", "perturbation") for kind in ("png", "svg")
    }


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("geometry", tmp_path / "nowhere", "--output", tmp_path / "output") == 2
    assert run_script("energy", tmp_path, "--output", tmp_path / "output") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "output").exists()


def test_runs_of_one_name_are_told_apart(finished_run: Path, tmp_path: Path) -> None:
    other: Any = tmp_path / "robot"
    other.symlink_to(finished_run / "checkpoints/step-000002")
    runs = analysed_runs([finished_run, finished_run / "checkpoints/step-000002"])
    assert [run.name for run in runs] == ["robot", "step-000002"]
    with pytest.raises(UserError, match="twice"):
        analysed_runs([finished_run, finished_run])

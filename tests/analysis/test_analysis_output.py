"""The files of analyses: tables, plots that name their command, and the scripts that write them."""

from __future__ import annotations

import csv
import math
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.analysis import plots
from ether_diffusion.analysis.analysed_run import analysed_run, analysed_runs
from ether_diffusion.analysis.output import COLOURS, plot, write_table
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_holds_numbers_and_empty_cells(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "x": 1 / 3, "n": 2, "y": math.nan}, {"name": "c", "x": 1e-17, "n": 3, "y": None}]
    path = write_table(tmp_path / "new/table.csv", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == ["a, b", "c"]
    assert [float(row["x"]) for row in found] == pytest.approx([1 / 3, 1e-17], rel=1e-9)
    assert [row["y"] for row in found] == ["", ""]


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    """A run's folder may have any name, and a spreadsheet would compute it: =HYPERLINK(…), +1+cmd|…"""
    names = ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\tx", "\r=1", "plain", "a=b"]
    path = write_table(tmp_path / "table.csv", [{"run": name, "rate": -0.5} for name in names])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [*(f"'{name}" for name in names[:5]), "'\n=1", *names[6:]]
    assert {row["rate"] for row in rows} == {"-0.5"}


def test_plots_name_their_command_and_are_equal_bytes_when_repeated(tmp_path: Path) -> None:
    command = "ether-diffusion analyze geometry 'a run' --output x"
    for name in ("first", "second"):
        with plot(tmp_path / name, command, size=(3, 2)) as (axes,):
            axes.plot([1, 2], [3, 4], label="x")
            axes.legend()
    assert Image.open(tmp_path / "first.png").text["Description"] == command  # pyright: ignore
    assert command in (tmp_path / "first.svg").read_text()
    for kind in ("png", "svg"):
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()
    assert len(list(tmp_path.glob("[!.]*"))) == 4


def test_a_plot_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), plot(tmp_path / "plot", "command"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_averaged_and_unknown_numbers_left_out() -> None:
    rows = [{"x": 2.0, "y": 1.0}, {"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 3.0}, {"x": 3.0, "y": math.nan}]
    assert plots.curve(rows, "x", "y") == ([1.0, 2.0], [5.0, 2.0])


def run_script(name: str, *arguments: object) -> int:
    """Run a script of eval/ as a command, in this process."""
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


def saved(folder: Path, settings: Any, seed: int = 0, **training: int) -> Path:
    """A run folder as a training writes it, with an adapter at its initialisation."""
    unet = load_base("tiny").unet
    attach(unet, settings, seed)
    save_adapter(unet, folder / "adapter", base_model="tiny")
    config = {
        "base_model": "tiny",
        "seed": seed,
        "adapter": settings.model_dump(mode="json"),
        "training": {"learning_rate": 6e-3, **training},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_only_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path: Path) -> None:
    """ETHER's distance is 2 sqrt(n): n = 1 and n = 4 must not be averaged."""
    layers = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]

    def run(name: str, method: str, seed: int = 0, steps: int = 100, **settings: Any) -> Path:
        return saved(tmp_path / name, METHODS[method](target=layers, **settings), seed, steps=steps)

    runs = [
        run("one-0", "ether", num_blocks=1),
        run("one-1", "ether", num_blocks=1, seed=1),
        run("four", "ether", num_blocks=4),
        run("long", "ether", num_blocks=1, steps=200),
        run("plus", "ether_plus"),
        run("plus-in", "ether_plus", sides="in"),
        run("oft", "oft"),
        run("coft", "oft", constrained=True),
        run("small", "lora", alpha=2),
        run("lora", "lora"),
    ]
    assert run_script("geometry", *runs, "--output", tmp_path / "out") == 0
    rows = {row["run"]: row for row in read(tmp_path / "out/geometry.csv")}
    columns = ("method", "num_blocks", "sides", "constrained", "other_settings", "steps", "seed")
    assert [rows["one-1"][name] for name in columns] == ["ETHER", "1", "in", "", "", "100", "1"]
    assert [rows["coft"][name] for name in columns] == ["COFT", "4", "", "True", "", "100", "0"]
    assert rows["small"]["other_settings"] == "alpha 2.0"
    assert {row["target"] for row in rows.values()} == set(layers)
    legend = (tmp_path / "out/geometry.svg").read_text()
    for label in ("ETHER, n=1, 100 steps", "ETHER, n=4, 100 steps", "ETHER, n=1, 200 steps", "ETHER+, one-sided"):
        assert f">{label}<" in legend
    for label in ("ETHER+, two-sided", "OFT", "COFT", "LoRA", "LoRA, alpha 2.0"):
        assert f">{label}<" in legend

    means = [
        {**run.facts, "transform": float(rows[run.facts["run"]]["transform"] or "nan")} for run in analysed_runs(runs)
    ]
    found = plots.series(means)
    assert [len(one.rows) for one in found] == [2, *[1] * 8]
    assert [plots.curve(one.rows, "learning_rate", "transform")[1] for one in found[:3]] == [
        pytest.approx([2]),
        pytest.approx([4]),
        pytest.approx([2]),
    ]
    looks = [tuple(str(one.style.get(key)) for key in ("color", "marker", "linestyle", "fillstyle")) for one in found]
    assert len(set(looks)) == len(looks)
    assert COLOURS["COFT"] in {one.style["color"] for one in found}


def test_steps_are_those_of_the_checkpoint_or_the_config(finished_run: Path, tmp_path: Path) -> None:
    """A checkpoint's own; if the config counts epochs, those of the last checkpoint, by number."""
    assert [analysed_run(finished_run / place).facts["steps"] for place in ("", "checkpoints/step-000004")] == [6, 4]
    run = saved(tmp_path / "run", METHODS["ether"](target=["to_q"]), epochs=2)
    assert analysed_run(run).facts["steps"] is None
    for step in (1_000_000, 14, 999_999):
        (run / f"checkpoints/step-{step:06}").mkdir(parents=True)
    assert analysed_run(run).facts["steps"] == 1_000_000
    alone = tmp_path / "alone"
    (run / "adapter").rename(alone)
    bare = analysed_run(alone).facts
    assert [bare[name] for name in ("num_blocks", "sides", "target", "steps")] == [1, "in", "to_q", None]


STARTS = {
    "ether": "{{method: ether, sides: both}}",
    "ether_plus": "{{method: ether_plus}}",
    "warm": "{{method: ether_plus, init_from: {run}}}",
    "second": "{{method: magnitude, after: {run}, target: null}}",
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("warm",), id="warm"),
        pytest.param(("second", "ether", "ether_plus"), id="others", marks=pytest.mark.slow),
    ],
)
def test_energy_starts_where_the_training_did(
    finished_run: Path, make_config: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """At a rate of 0 the first checkpoint holds the start; for ETHER+ that is no change."""
    starts = {name: STARTS[name].format(run=finished_run) for name in names}
    common = ("data.prior=null", "training.steps=1", "training.batch_size=1", "training.learning_rate=0")
    for name, adapter in starts.items():
        still = (*common, "training.require_certificate=false")
        dreambooth.run(make_config(tmp_path / name, f"adapter={adapter}", "seed=3", *still))
    assert run_script("energy", *(tmp_path / name for name in starts), "--output", tmp_path / "out") == 0
    rows = {(row["run"], int(row["step"])): float(row["mean_change"]) for row in read(tmp_path / "out/energy.csv")}
    assert rows.keys() == {(name, step) for name in starts for step in (0, 1)}
    for name in starts:
        assert rows[name, 0] == pytest.approx(rows[name, 1], rel=1e-6)
        assert (abs(rows[name, 0]) > 1e-6) == (name != "ether_plus")
    trained = read(tmp_path / "out/layers.csv")
    assert {row["run"] for row in trained if row["step"] == "0"} == starts.keys() - {"ether_plus"}


def test_an_unknown_start_has_no_row(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["adapter"]["init_from"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_script("energy", run, "--output", tmp_path / "out") == 0
    assert [int(row["step"]) for row in read(tmp_path / "out/energy.csv")] == [2, 4, 6]
    assert "no row for step 0: adapter.init_from" in capsys.readouterr().err


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


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("geometry", tmp_path / "nowhere", "--output", tmp_path / "output") == 2
    assert run_script("energy", tmp_path, "--output", tmp_path / "output") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "output").exists()


def test_runs_of_one_name_get_different_names(finished_run: Path, tmp_path: Path) -> None:
    other: Any = tmp_path / "robot"
    other.symlink_to(finished_run / "checkpoints/step-000002")
    runs = analysed_runs([finished_run, finished_run / "checkpoints/step-000002"])
    assert [run.facts["run"] for run in runs] == ["robot", "step-000002"]
    with pytest.raises(UserError, match="twice"):
        analysed_runs([finished_run, finished_run])

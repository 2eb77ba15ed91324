"""Grids: their cells, resuming, trainings that diverge, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_benchmark import SHIPPED, times

from ether_diffusion.benchmark.grid import Spread, Summary, best_points, last_step, read_grid
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.grid_report import run_grid
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.config import ConfigError, load_config
from ether_diffusion.errors import UserError
from support.benchmark_folders import write_protocol

GRIDS = [path for path in SHIPPED if "python eval/grid.py" in path.read_text()]
COMMAND = "python eval/grid.py --config mine.yaml"


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """A worker sets its process's threads, which other tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)


def write(
    folder: Path,
    methods: str = "lora: {config: quickstart/dreambooth, settings: [adapter.method=lora]}",
    settings: str = "training.steps=2",
) -> Path:
    """One subject at two rates, two checkpoints. At the second rate LoRA's second gradient overflows fp32."""
    path = folder / "grid.yaml"
    path.write_text(f"""output_dir: {folder / "out"}
device: cpu
threads: 1
dreambooth:
  protocol: {write_protocol(folder)}
  dataset_dir: "builtin:"
  subjects: [robot]
  batch_size: 2
  also_checkpoints: [1]
  settings: [adapter.target=attention, training.schedule=constant, training.warmup_steps=0, training.ema_decay=null,
    {settings}, training.batch_size=1, training.checkpoint_every=1]
  methods:
    {methods}
  grid:
    axes:
      training.learning_rate: [1.0e-3, 1.0e+3]
    metrics: [backbone]
    references:
      - {{source: paper, axis: training.learning_rate, metric: backbone, at: [1.0e-3], values: {{lora: [0.5]}}}}
""")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    outcome, files = run_grid(load_config(GridConfig, write(folder)), COMMAND)
    assert [unit.method for unit in outcome.failed] == ["lora-learning_rate_1000.0-seed_0"]
    assert files
    assert all(file.stat().st_size for file in files)
    return folder


def test_a_grid_is_the_product_of_its_axes_and_seeds(tmp_path: Path) -> None:
    methods = "lora: {config: quickstart/dreambooth}\n    ether: {config: quickstart/dreambooth, settings: [seed=7]}"
    axes = "{training.learning_rate: [1.0e-3, 1.0e-2], adapter.num_blocks: [1, 4]}"
    config = load_config(
        GridConfig,
        write(tmp_path, methods),
        [
            f"dreambooth.grid.axes={axes}",
            "dreambooth.grid.axes_of={lora: {adapter.num_blocks: []}}",
            "dreambooth.grid.seeds=[0, 3]",
        ],
    )
    part = config.benchmark().dreambooth
    assert part is not None
    assert len(part.methods) == 2 * (2 + 4)
    assert list(part.methods)[:3] == [
        "lora-learning_rate_0.001-seed_0",
        "lora-learning_rate_0.01-seed_0",
        "ether-learning_rate_0.001-num_blocks_1-seed_0",
    ]
    assert part.methods["ether-learning_rate_0.01-num_blocks_4-seed_3"].settings == (
        "seed=7",
        "training.learning_rate=0.01",
        "adapter.num_blocks=4",
        "seed=3",
    )


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_have_trainings_and_open_with_their_command(path: Path) -> None:
    config = load_config(GridConfig, path)
    plan = Plan(config.benchmark())
    for task in Plan(config).tasks:
        part = config.dreambooth if task == "dreambooth" else config.controllable
        assert part is not None
        for unit in [unit for unit in plan.units() if unit.task == task and unit.subject in (None, *plan.names()[:1])]:
            cell = next(cell for cell in part.cells() if cell.name == unit.method)
            settings = plan.training(unit).model_dump()
            for axis, value in cell.point:
                section, _, key = axis.partition(".")
                assert settings[section][key] == value
            assert settings["seed"] == cell.seed
    assert f"python eval/grid.py --config {path.relative_to(SHIPPED[0].parents[2])}" in path.read_text()


def test_tables_hold_the_grids_values_next_to_published_ones(finished: Path) -> None:
    folder = finished / "out/dreambooth"
    with (folder / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["learning_rate"], row["step"], row["scored"], row["diverged"]) for row in rows] == [
        ("0.001", "1", "1", "0"),
        ("0.001", "2", "1", "0"),
        ("1000", "1", "0", "1"),
        ("1000", "2", "0", "1"),
    ]
    name = "lora-learning_rate_0.001-seed_0"
    results = [json.loads((folder / name / place / "results.json").read_text()) for place in ("steps/step-000001", "")]
    assert [float(row["backbone"]) for row in rows[:2]] == pytest.approx(
        [one["metrics"]["backbone"]["value"] for one in results]
    )
    assert [row["backbone (paper)"] for row in rows] == ["", "0.5", "", ""]
    table = (folder / "grid.md").read_text()
    assert COMMAND in table
    assert "diverged" in table
    assert (finished / "out/command.txt").read_text() == f"{COMMAND}\n"
    assert {file.name for file in folder.glob("*.*g")} == {
        f"{stem}.{kind}" for stem in ("learning_rate", "steps") for kind in ("png", "svg")
    }


def test_a_finished_grid_is_not_touched_even_where_it_diverged(finished: Path) -> None:
    kinds = ("dreambooth/lora*/**/*.png", "dreambooth/lora*/runs/**/*", "dreambooth/lora*/**/scores/*")
    before = [times(finished / "out", kind) for kind in kinds]
    assert all(before)
    run_grid(load_config(GridConfig, finished / "grid.yaml"), COMMAND)
    assert [times(finished / "out", kind) for kind in kinds] == before


def test_points_can_be_added_to_a_grid(finished: Path) -> None:
    """The new points count as waiting."""
    config = load_config(
        GridConfig, finished / "grid.yaml", ["dreambooth.grid.axes={training.learning_rate: [1.0e-3, 2.0e-3]}"]
    )
    counts = [
        (dict(one.point)["training.learning_rate"], one.scored, one.waiting) for one in read_grid(config, "dreambooth")
    ]
    assert counts == [(1e-3, 1, 0)] * 2 + [(2e-3, 0, 1)] * 2


def test_the_last_step_of_epochs_is_that_of_the_last_checkpoint_by_number(tmp_path: Path) -> None:
    """In the order of text, step-1000000 comes before step-999999."""
    config = load_config(GridConfig, write(tmp_path, settings="training.steps=null, training.epochs=2"))
    assert last_step(config, "dreambooth") is None
    plan = Plan(config.benchmark())
    for step in (999_999, 1_000_000):
        (plan.run_folder(plan.units()[1]) / f"checkpoints/step-{step}").mkdir(parents=True)
    assert last_step(config, "dreambooth") == 1_000_000
    assert last_step(load_config(GridConfig, write(tmp_path)), "dreambooth") == 2


def test_the_best_point_is_one_without_diverged_seeds() -> None:
    def summary(rate: float, mean: float, diverged: int = 0, step: int | None = None) -> Summary:
        values = {"FID": Spread(mean, mean, mean)}
        return Summary("ether", (("training.learning_rate", rate),), step, 2 - diverged, diverged, 0, values)

    found = [summary(0.1, 5, diverged=1), summary(0.2, 9), summary(0.3, 7), summary(0.4, 1, step=100)]
    assert best_points(found, "FID", higher_is_better=False)["ether"].point == (("training.learning_rate", 0.3),)
    assert best_points(found, "FID")["ether"].point == (("training.learning_rate", 0.2),)
    assert Cell("ether", found[0].point, 4).name == "ether-learning_rate_0.1-seed_4"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "axes={training.learning_rate: [0.1, 0.1]}",
            r"axes\.training\.learning_rate: \[0\.1, 0\.1\]; expected .* once",
        ),
        ("axes={training.learning_rate: [a/b]}", r"'a/b'; expected numbers, or words"),
        ("axes={seed: [1, 2]}", r"seeds are averaged over; give them as grid\.seeds"),
        ("axes={data.learning_rate: [1]}", r"expected names that end differently"),
        ("axes_of={lora: {training.learning_rat: [1]}}", r"'training\.learning_rat'; Did you mean"),
        ("axes_of={lorra: {training.learning_rate: [1]}}", r"'lorra'; Did you mean 'lora'"),
        ("seeds=[1, 1]", r"seeds: \[1, 1\]; expected each once"),
        ("references=[{source: x, axis: a, metric: m, at: [1], values: {lora: [1, 2]}}]", r"2 values; expected 1"),
        ("references=[{source: x, axis: a, metric: m, at: [1], values: {}}]", r"references\[0\]\.axis: 'a'"),
        ("metrics=[backbones]", r"has no metric 'backbones'\. Did you mean 'backbone'"),
        ("axes={training.stepps: [1]}", r"training\.stepps"),
        (f"seeds={list(range(5001))}", r"grid: 10,002 trainings; expected at most 10,000"),
    ],
)
def test_faults_are_reported_before_anything_is_written(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((UserError, ConfigError), match=message):
        run_grid(load_config(GridConfig, write(tmp_path), [f"dreambooth.grid.{override}"]), COMMAND)
    assert not (tmp_path / "out").exists()

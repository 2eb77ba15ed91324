"""`train --many FILE`: a file of runs -> their configs, and what is wrong with such a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ether_diffusion.training import dreambooth
from ether_diffusion_cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["train", "dreambooth", "--config", str(ROOT / "tests/dreambooth.yaml")]


def test_the_file_of_the_page_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/dreambooth.md").read_text()
    (tmp_path / "runs.yaml").write_text(page.split("```\n# runs.yaml\n")[1].split("```")[0])
    command = ["train", "dreambooth", "--config", "dreambooth/ether_plus", "--many", str(tmp_path / "runs.yaml")]
    assert main([*command, "--print-config"]) == 0
    one, two = yaml.safe_load_all(capsys.readouterr().out)
    assert (one["data"]["class_name"], two["data"]["class_name"]) == ("dog", "cat")
    assert (one["training"]["learning_rate"], two["training"]["learning_rate"]) == (0.006, 0.003)


def test_each_run_has_its_own_settings_over_those_of_file_and_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text(
        "- output_dir: runs/a\n  data.class_name: cat\n  training.learning_rate: 1e-3\n"
        "- {output_dir: runs/b, seed: 5, data: {identifier: sks, prior: null}}\n"
    )
    assert main([*CONFIG, "--many", str(file), "seed=4", "training.steps=9", "--print-config"]) == 0
    one, two = yaml.safe_load_all(capsys.readouterr().out)
    assert (one["output_dir"], one["seed"], one["data"]["class_name"]) == ("runs/a", 4, "cat")
    assert one["training"]["learning_rate"] == 0.001
    assert (two["output_dir"], two["seed"], two["data"]["class_name"]) == ("runs/b", 5, "toy")
    assert two["data"]["prior"] is None
    assert two["validation"]["prompts"][0] == "a sks toy in the snow"
    assert one["training"]["steps"] == two["training"]["steps"] == 9


def test_the_options_reach_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, calls = tmp_path / "runs.yaml", list[Any]()
    file.write_text("[{output_dir: a}, {output_dir: b}]")
    monkeypatch.setattr(
        dreambooth,
        "TASK",
        dreambooth.TrainingTask(**{**vars(dreambooth.TASK), "run_many": lambda *a, **b: calls.append((a, b))}),
    )
    assert main([*CONFIG, "--many", str(file), "--max-together", "2", "--dry-run"]) == 0
    ((configs,), options) = calls[0]
    assert [str(config.output_dir) for config in configs] == ["a", "b"]
    assert options == {"dry_run": True, "max_together": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: a", "expected a list of runs"),
        ("[]", "expected a list of runs"),
        ("text", "expected a list of runs"),
        ("- [a", "not valid YAML"),
        ("- 3", "run 1: 3; expected settings, as output_dir: runs/a."),
        (
            "- {output_dir: a}\n- {output_dir: b, training.stepz: 3}",
            "run 2: training.stepz=3: unknown key. Did you mean",
        ),
        ("- {output_dir: a, data.class_name: 3}", "run 1: data.class_name=3: "),
    ],
)
def test_a_fault_of_the_file_is_named_with_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text(text)
    assert main([*CONFIG, "--many", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_options_and_tasks_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONFIG, "--max-together", "2"]) == 2
    assert "--max-together is an option of --many FILE" in capsys.readouterr().err
    file = tmp_path / "runs.yaml"
    file.write_text("- {output_dir: a}")
    config = ["--config", "quickstart/controllable", "--many", str(file)]
    assert main(["train", "controllable", *config]) == 2
    assert "controllable runs do not train together" in capsys.readouterr().err

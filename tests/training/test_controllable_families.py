"""Controllable runs of the families that follow conditions, on random models with cut sizes; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.training import controllable
from ether_diffusion_cli import main
from support.pipelines import pipeline
from support.runs import losses, trained_weights

METHODS = {"encoder": [], "controlnet": ["adapter.method=controlnet"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_run_trains_validates_and_generates(
    name: str, method: str, make_controllable: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    pipeline(name).save_pretrained(tmp_path / "base")
    overrides = [f"base_model={tmp_path / 'base'}", "training.steps=3", "validation.images=1", *METHODS[method]]
    controllable.run(make_controllable(tmp_path / "run", *overrides, "training.learning_rate=0.001"))
    assert len(losses(tmp_path / "run")) == 3
    assert trained_weights(tmp_path / "run")
    arguments = ["--dataset", str(scenes), "--split", "validation", "--limit", "1", "--steps", "2"]
    assert main(["generate", "--adapter", str(tmp_path / "run"), *arguments, "--output", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images/images").glob("*.png"))) == 1


@pytest.mark.slow
def test_a_family_without_conditions_is_refused_in_one_line(
    make_controllable: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline("sd3").save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"^base_model: .* is of the family Stable Diffusion 3, which follows no") as e:
        controllable.run(make_controllable(tmp_path / "run", f"base_model={tmp_path / 'base'}"))
    assert "\n" not in str(e.value)

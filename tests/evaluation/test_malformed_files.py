"""Files that parse but are not what they stand for are one line with the file's path, and results that differ in images
do not compare."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.comparison import check_comparable, comparison
from ether_diffusion.evaluation.image_records import read_list
from ether_diffusion.evaluation.results import COUNTS, Results, sampled_with
from ether_diffusion_cli import main

METRIC = {"value": 0.5, "low": 0.4, "high": 0.6, "higher_is_better": True}
WHOLE: dict[str, Any] = {
    "protocol": "tests/one",
    "protocol_digest": "a" * 64,
    "run": {"scheduler": "ddim", "steps": 20, "guidance": 3.0, "seed": 0},
    "judges": {"dino": {"source": "a file", "sha256": "b" * 64}},
    "versions": {},
    "counts": dict.fromkeys(COUNTS, 0) | {"images": 18, "expected": 18, "subjects": 1},
    "metrics": {"DINO": METRIC},
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**WHOLE, **changes}


MALFORMED: dict[str, Any] = {
    "null": None,
    "a number": 3,
    "a list": [],
    "another file of ours": {"pareto": [], "scores": {}},
    "a key that is unknown": changed(surprise=1),
    "counts of another kind": changed(counts=[1, 2]),
    "counts that lack images": changed(counts={"subjects": 1, "missing": 0, "black": 0, "duplicate": 0}),
    "negative counts": changed(counts=WHOLE["counts"] | {"missing": -1}),
    "a count that is text": changed(counts=WHOLE["counts"] | {"images": "many"}),
    "a metric that is a number": changed(metrics={"DINO": 0.5}),
    "a value that is text": changed(metrics={"DINO": METRIC | {"value": "high"}}),
    "not a number": changed(metrics={"DINO": METRIC | {"value": math.nan}}),
    "an infinite interval": changed(metrics={"DINO": METRIC | {"high": math.inf}}),
    "an infinite ceiling": changed(ceilings={"DINO": -math.inf}),
    "no interval": changed(metrics={"DINO": {"value": 0.5, "higher_is_better": True}}),
    "a scorer without a digest": changed(judges={"dino": {"source": "a file"}}),
    "a run that is a list": changed(run=[]),
    "class 0": changed(per_image={"upernet": {"a": [[0, 1, 1, 1]]}}),
    "negative pixels": changed(per_image={"upernet": {"a": [[1, -1, 1, 1]]}}),
    "a class of three numbers": changed(per_image={"upernet": {"a": [[1, 1, 1]]}}),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_results_are_one_line(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    assert main(["compare", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith(f"ether-diffusion: {file}: not results of an evaluation (")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"\x00", nested(100_000).encode(), b"1" * 5_000])
def test_unreadable_results_are_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_bytes(content)
    assert main(["compare", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "results.json") in line


def test_a_class_above_the_protocols_is_refused() -> None:
    found = Results.model_validate(changed(per_image={"upernet": {"a": [(151, 1, 1, 1)]}}))
    with pytest.raises(UserError, match=r"per_image\.upernet counts class 151; tests/one has 150 classes\."):
        found.class_counts("upernet", 150)
    assert found.class_counts("upernet", 151)[0, :, 150].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "null",
        '"a.png"',
        '["a.png"]',
        "{}",
        '{"file": null}',
        '{"file": 3}',
        '{"file": {}}',
        nested(100_000),
        "1" * 5_000,
    ],
)
def test_malformed_lists_of_images_are_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_text('{"file": "0.png"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"images\.jsonl:2: expected a JSON object with file as text\."):
        read_list(tmp_path)


def test_a_prompt_may_hold_any_separator_of_lines(tmp_path: Path) -> None:
    """JSON writes U+2028, U+0085 and a form feed as they are, which `str.splitlines` would break a row at."""
    prompts = ["a dog\u2028in the snow", "a dog\x85in the snow", "a dog\x0cin the snow", "a dog\nin the snow"]
    rows = [json.dumps({"file": "0.png", "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "images.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert [row["prompt"] for row in read_list(tmp_path)] == prompts


def test_a_pipe_is_refused_and_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("results.json", "images.jsonl", "own.yaml"):
        os.mkfifo(tmp_path / name)
    assert main(["compare", str(tmp_path)]) == 2
    assert "results.json: a named pipe" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"images\.jsonl: a named pipe"):
        read_list(tmp_path)
    assert main(["score", "--ceilings", "--real", "builtin:", "--protocol", str(tmp_path / "own.yaml")]) == 2
    assert "own.yaml" in capsys.readouterr().err


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no data": lambda config: config.pop("data"),
    "empty data": lambda config: config.update(data=None),
    "no class": lambda config: config["data"].pop("class_name"),
    "no identifier": lambda config: config["data"].pop("identifier"),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_config_that_lacks_settings_is_one_line(
    command: str,
    change: Callable[[dict[str, Any]], object],
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(json.dumps(config))
    assert main([command, str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not in a run folder: no config.yaml that states 'data." in line
    assert not (run / "evaluation").exists()


def test_incomplete_sets_compare_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FID of half the scenes is another number than FID of all."""
    part = WHOLE["counts"] | {"images": 3, "missing": 15}
    results = {"whole": Results.model_validate(WHOLE), "part": Results.model_validate(changed(counts=part))}
    with pytest.raises(UserError, match=r"whole and part cannot be compared: 18 of 18 images and 3 of 18\. Generate"):
        check_comparable(results)
    rows = [line.split() for line in comparison(results, allow_incomplete=True).splitlines()]
    assert rows[0][-1] == "images"
    assert [row[-3:] for row in rows[1:3]] == [["18", "of", "18"], ["3", "of", "18"]]
    paths = [str(one.save(tmp_path / name / "results.json")) for name, one in results.items()]
    assert main(["compare", *paths]) == 2
    assert "Generate the missing ones, or take --allow-incomplete." in capsys.readouterr().err
    assert main(["compare", "--allow-incomplete", *paths]) == 0
    assert "3 of 18" in capsys.readouterr().out


def test_a_table_says_how_its_images_were_generated() -> None:
    lines = Results.model_validate(WHOLE).table().splitlines()
    assert lines[0] == "tests/one: ddim, 20 steps, guidance 3, seed 0"
    assert sampled_with({"steps": 7, "guidance": 7.5}) == "7 steps, guidance 7.5"
    assert Results.model_validate(changed(run={})).table().splitlines()[0] == "tests/one"


def test_only_subjects_that_were_asked_for_are_named_as_absent() -> None:
    absent = changed(absent_subjects=["robot", "monster"])
    assert Results.model_validate(absent).counted() == (
        "1 of 3 subjects, 18 of 18 images; 0 missing, 0 black, 0 duplicate"
    )
    absent["counts"] = WHOLE["counts"] | {"expected": 54, "missing": 36}
    assert Results.model_validate(absent).counted().endswith("36 missing, 0 black, 0 duplicate; without robot, monster")

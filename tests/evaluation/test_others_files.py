"""What score, evaluate and analyze write replaces no file of the user's, and this is found before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.analysis.output import check_outputs, write_table
from ether_diffusion.errors import UserError
from ether_diffusion_cli import main

ANALYSES = {
    "geometry": ("command.txt", "geometry.csv", "layers.csv", "geometry.png", "layers.svg"),
    "energy": ("command.txt", "energy.csv", "layers.csv", "energy.png", "energy.svg"),
    "perturbation": ("command.txt", "perturbation.csv", "perturbation.svg", "grid.png"),
    "cost": ("command.txt", "cost.csv", "cost.md", "cost.png"),
}
CASES = [
    *((("analyze", name), file) for name, files in ANALYSES.items() for file in files),
    *((("evaluate",), file) for file in ("scores.json", "contact_sheet.png")),
    (("score",), "results.json"),
    (("score", "--all-checkpoints"), "checkpoints.json"),
    (("score", "--all-checkpoints"), "step-000004/results.json"),
    (("score", "--ceilings", "--real", "builtin:"), "ceilings.json"),
]


@pytest.mark.parametrize(("command", "name"), CASES, ids=[" ".join((*command, name)) for command, name in CASES])
def test_a_file_of_the_users_is_refused_before_any_work(
    command: tuple[str, ...],
    name: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    for module in ("evaluation.quick_look", "evaluation.subject_images", "analysis.perturbation_report"):
        monkeypatch.setattr(f"ether_diffusion.{module}.load_pipeline", work)
    monkeypatch.setattr("ether_diffusion.analysis.analysed_run.load_base", work)
    monkeypatch.setattr("ether_diffusion.analysis.cost.count_passes", work)
    monkeypatch.setattr("ether_diffusion.evaluation.ceilings.photos_of", work)
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("a year of notes")
    run = [] if command[-1] in ("builtin:", "perturbation", "cost") else [str(finished_run)]
    assert main([*command, *run, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} was not written by this program" in line
    assert file.read_text() == "a year of notes"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


def test_our_own_files_are_replaced_until_somebody_changes_them(tmp_path: Path) -> None:
    for value in (1, 2):
        check_outputs(tmp_path, "table.csv")
        write_table(tmp_path / "table.csv", [{"x": value}])
    (tmp_path / "table.csv").write_text("x\n2 and a remark\n")
    with pytest.raises(UserError, match=r"table\.csv was not written by this program, or was changed since"):
        check_outputs(tmp_path, "table.csv")

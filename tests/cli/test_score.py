"""`ether-diffusion score` and `compare`, and the scripts over them: runs or images in, results and a table out."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.ceilings import Ceilings
from ether_diffusion.evaluation.protocols import MapProtocol, load_protocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.run_scores import MapRunScores
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.module_files import save_module
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.layouts import write_ade20k_splits
from ether_diffusion_cli import main
from support.benchmark_folders import write_map_protocol, write_protocol

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("score", …)` or `command("eval/dreambooth.py", …)`: exit code, output and errors, in this process."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        if name.endswith(".py"):
            monkeypatch.setattr(sys, "argv", [name, *words])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            code = int(ended.value.code or 0)
        else:
            code = main([name, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_every_checkpoint_of_a_run_is_scored_and_the_best_are_named(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    protocol, output = write_protocol(tmp_path), tmp_path / "scores"
    arguments = ("--protocol", protocol, "--output", output, "--device", "cpu")
    code, out, _ = command("eval/dreambooth.py", finished_run, "--all-checkpoints", *arguments)
    assert code == 0
    steps = [f"step-{step:06d}" for step in (2, 4, 6)]
    assert [line.split()[0] for line in out.splitlines()[1:4]] == steps
    chosen = json.loads((output / "checkpoints.json").read_text())
    results = {step: Results.read(output / step) for step in steps}
    assert chosen["scores"] == {
        step: [one.metrics[name].value for name in ("backbone", "CLIP-T")] for step, one in results.items()
    }
    for step, (x, y) in chosen["scores"].items():
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in chosen["scores"].values())
        assert (step in chosen["pareto"]) is not beaten
    # The run itself is its last checkpoint.
    assert command("score", finished_run, "--protocol", protocol, "--output", tmp_path / "run")[0] == 0
    last, whole = results[steps[-1]], Results.read(tmp_path / "run")
    assert "not_told" not in whole.run
    assert whole.metrics == last.metrics
    assert whole.counts == {**last.counts, "subjects": 1, "images": 4, "expected": 4}
    # Its images, scored without it; and both side by side.
    found = command(
        "eval/dreambooth.py", "--images", tmp_path / "run/images", "--real", "builtin:", "--protocol", protocol
    )
    assert found[0] == 0
    of_folder = Results.read(tmp_path / "run/images")
    assert of_folder.metrics == whole.metrics
    assert of_folder.absent_subjects == whole.absent_subjects == ["monster"]
    assert (of_folder.counts["missing"], whole.counts["missing"]) == (4, 0)
    assert "1 of 2 subjects, 4 of 8 images; 4 missing" in found[1]
    code, out, _ = command("compare", "--markdown", tmp_path / "run/results.json", output / steps[0])
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:4]] == ["| run", "| step-000002"]


def test_ceilings_are_computed_from_photos_alone(tmp_path: Path, command: Command) -> None:
    protocol, output = write_protocol(tmp_path), tmp_path / "out"
    arguments = ("--ceilings", "--real", "builtin:", "--protocol", protocol, "--device", "cpu")
    code, out, _ = command("eval/dreambooth.py", *arguments, "--output", output)
    assert code == 0
    found = Ceilings.model_validate_json((output / "ceilings.json").read_text())
    assert set(found.ceilings_per_subject["backbone"]) == {"robot", "monster"}
    assert out.splitlines()[-1] == f"Ceilings: {output / 'ceilings.json'}"
    assert f"{found.ceilings['backbone']:.3f}" in out
    before = sorted(tmp_path.rglob("*"))
    assert command("score", *arguments)[:2] == (0, out.rpartition("Ceilings: ")[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_different_methods_are_not_averaged(finished_run: Path, tmp_path: Path, command: Command) -> None:
    """Refused before anything is generated."""
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["instance_dir"] = "builtin:monster"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(other / "adapter")
    unet = load_base("tiny").unet
    attach(unet, METHODS["lora"]())
    save_adapter(unet, other / "adapter", base_model="tiny")
    arguments = ("--protocol", write_protocol(tmp_path), "--output", tmp_path / "out")
    code, _, errors = command("score", finished_run, other, *arguments)
    assert code == 2
    assert "robot and monster were generated by different methods" in errors
    assert not (tmp_path / "out").exists()


def test_scenes_are_generated_and_scored_from_a_run_and_from_a_folder(tmp_path: Path, command: Command) -> None:
    scenes = write_ade20k_splits(tmp_path / "scenes", {"training": range(2), "validation": range(10, 13)})
    base, run = load_base("tiny"), tmp_path / "run"
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    save_module(encoder, run / "condition_encoder")
    save_module(encoder, run / "checkpoints/step-000001/condition_encoder")
    config = {"base_model": "tiny", "adapter": {"method": "none"}, "data": {"dataset_dir": str(scenes)}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    protocol = write_map_protocol(tmp_path)
    code, out, _ = command("score", run, "--protocol", protocol, "--device", "cpu")
    assert code == 0
    scored = run / "evaluation/tests-maps"
    assert f"Results: {scored / 'results.json'}" in out
    first = Results.read(scored)
    assert first.counts["images"] == 3
    assert "not_told" not in first.run
    # The pictures that the data set has, in a copy without captions: what can be reached.
    bare = Path(shutil.copytree(scenes, tmp_path / "bare"))
    shutil.rmtree(bare / "captions")
    for file in (scenes / "images/validation").iterdir():
        save_png(Image.open(file), tmp_path / "real" / f"{file.stem}.png")
    real = ("--images", tmp_path / "real", "--dataset", bare, "--protocol", protocol)
    assert command("eval/controllable.py", *real)[0] == 0
    best = Results.read(tmp_path / "real")
    assert best.metrics["mIoU"].value == pytest.approx(best.ceilings["mIoU"])
    assert best.metrics["FID"].value == pytest.approx(0, abs=1e-6)
    assert best.metrics["mIoU"].value > first.metrics["mIoU"].value
    assert (
        command("eval/controllable.py", run, "--all-checkpoints", "--protocol", protocol, "--output", tmp_path / "all")[
            0
        ]
        == 0
    )
    assert Results.read(tmp_path / "all/step-000001").metrics == first.metrics


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval/dreambooth.py nowhere", "nowhere"),
        ("score --images nowhere --real x --protocol tinyworld/dreambooth-v1", "no such folder"),
        ("eval/dreambooth.py --images x --real x --protocol dreambooth/oft-v2", "Did you mean 'dreambooth/oft-v1'"),
        ("score --ceilings --real builtin: --scorer other=x", "other: the protocol has no such scorer"),
        ("score --ceilings --real builtin: --judge other", "other: expected NAME=SOURCE"),
        ("eval/controllable.py --images nowhere --dataset nowhere", "nowhere"),
        ("eval/compare.py nowhere/results.json", "nowhere: no such file"),
        ("score", "expected RUN, or --images DIR, or --ceilings"),
        ("score RUN --ceilings --real builtin:", "expected RUN, or --images DIR, or --ceilings"),
        ("score --images x", "--images needs --real, the photos of its subjects, or --dataset, its maps"),
        ("score --images x --real x --dataset x", "give one of them"),
        ("score --ceilings", "--ceilings needs --real"),
        ("score --images x --real x --all-checkpoints", "--all-checkpoints needs one RUN"),
        ("score a b", "several runs need --output"),
        ("score a --class dog", "--class is for --photos, one's own subject; give both"),
        ("score a --photos x --real x", "takes neither --protocol nor --real"),
        ("score --images x --real x --photos x", "--photos needs one RUN"),
    ],
)
def test_bad_input_is_one_line(command: Command, line: str, message: str) -> None:
    name, *arguments = line.split()
    code, out, errors = command(name, *arguments)
    assert (code, out) == (2, "")
    assert errors.startswith(f"{name if name.endswith('.py') else 'ether-diffusion'}: ")
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("size", ["0", "-1"])
def test_batches_hold_at_least_one_image(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "--ceilings", "--real", "builtin:", "--batch-size", size])
    assert f"--batch-size: {size}: expected a whole number from 1" in capsys.readouterr().err


def test_the_runs_kind_chooses_the_protocol(finished_run: Path, tmp_path: Path, command: Command) -> None:
    """A run and a protocol of different kinds are refused, and so are options of the other kind."""
    base, maps = load_base("tiny"), tmp_path / "maps"
    save_module(build_condition_encoder(base.unet, base.vae_factor), maps / "condition_encoder")
    (maps / "config.yaml").write_text("base_model: tiny\nadapter: {method: none}\n")
    of_maps, of_subjects = "tinyworld/s2i-v1 is a protocol of label maps", "dreambooth-v1 is a protocol of subjects"
    for arguments, message in (
        ((maps, "--real", "x"), f"--real: {of_maps}"),
        ((maps, "--identifier", "x"), f"--identifier: {of_maps}"),
        ((finished_run, "--dataset", "x"), f"--dataset: tinyworld/{of_subjects}"),
        ((finished_run, "--caption-template", "x"), f"--caption-template: tinyworld/{of_subjects}"),
        ((maps, "--protocol", "tinyworld/dreambooth-v1"), f"a controllable run, but tinyworld/{of_subjects}"),
        ((finished_run, "--protocol", "tinyworld/s2i-v1"), f"a run of a subject, but {of_maps}"),
        (("--ceilings", "--real", "x", "--protocol", "tinyworld/s2i-v1"), f"--ceilings: {of_maps}"),
        ((maps,), "give --dataset"),
    ):
        code, out, errors = command("score", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in errors
        assert len(errors.splitlines()) == 1


def test_maps_are_scored_one_run_at_a_time(tmp_path: Path) -> None:
    protocol = load_protocol(MapProtocol, "tinyworld/s2i-v1")
    pairs: Any = None
    with pytest.raises(UserError, match=r"tinyworld/s2i-v1 scores one run at a time, not 2\."):
        MapRunScores(protocol=protocol, scorers={}, pairs=pairs).of_runs([tmp_path, tmp_path], tmp_path)

"""The evaluation scripts as commands: runs or images in, results and a table out; one line for what is the user's."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from benchmark_cases import write_map_protocol, write_protocol
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.storage import save_adapter
from ether_diffusion.evaluation.ceilings import Ceilings
from ether_diffusion.evaluation.results import Results
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder, save_condition_encoder
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.layouts import write_ade20k_splits

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("dreambooth", …)`: exit code, output and errors of a script of eval/, in this process."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"eval/{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"eval/{name}.py"), run_name="__main__")
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return call


def test_every_checkpoint_of_a_run_is_scored_and_the_best_are_named(
    finished_run: Path, tmp_path: Path, command: Command
) -> None:
    protocol, output = write_protocol(tmp_path), tmp_path / "scores"
    arguments = ("--protocol", protocol, "--output", output, "--device", "cpu")
    code, told, _ = command("dreambooth", finished_run, "--all-checkpoints", *arguments)
    assert code == 0
    steps = [f"step-{step:06d}" for step in (2, 4, 6)]
    assert [line.split()[0] for line in told.splitlines()[1:4]] == steps
    chosen = json.loads((output / "checkpoints.json").read_text())
    results = {step: Results.read(output / step) for step in steps}
    assert chosen["scores"] == {
        step: [one.metrics[name].value for name in ("backbone", "CLIP-T")] for step, one in results.items()
    }
    for step, (likeness, faith) in chosen["scores"].items():
        beaten = any(a >= likeness and b >= faith and (a, b) != (likeness, faith) for a, b in chosen["scores"].values())
        assert (step in chosen["pareto"]) is not beaten
    # The run itself is its last checkpoint.
    assert command("dreambooth", finished_run, "--protocol", protocol, "--output", tmp_path / "run")[0] == 0
    last, whole = results[steps[-1]], Results.read(tmp_path / "run")
    assert "not_told" not in whole.run
    assert whole.metrics == last.metrics
    assert whole.counts == {**last.counts, "subjects": 1, "images": 4, "expected": 4}
    # Its images, scored without it; and both side by side.
    found = command("dreambooth", "--images", tmp_path / "run/images", "--real", "builtin:", "--protocol", protocol)
    assert found[0] == 0
    of_folder = Results.read(tmp_path / "run/images")
    assert of_folder.metrics == whole.metrics
    assert of_folder.absent_subjects == whole.absent_subjects == ["monster"]
    assert (of_folder.counts["missing"], whole.counts["missing"]) == (4, 0)
    assert "1 of 2 subjects, 4 of 8 images; 4 missing" in found[1]
    code, told, _ = command("compare", "--markdown", tmp_path / "run/results.json", output / steps[0])
    assert code == 0
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:4]] == ["| run", "| step-000002"]


def test_ceilings_are_computed_from_photos_alone(tmp_path: Path, command: Command) -> None:
    protocol, output = write_protocol(tmp_path), tmp_path / "out"
    arguments = ("--ceilings", "--real", "builtin:", "--protocol", protocol, "--device", "cpu")
    code, told, _ = command("dreambooth", *arguments, "--output", output)
    assert code == 0
    found = Ceilings.model_validate_json((output / "ceilings.json").read_text())
    assert set(found.ceilings_per_subject["backbone"]) == {"robot", "monster"}
    assert told.splitlines()[-1] == f"Ceilings: {output / 'ceilings.json'}"
    assert f"{found.ceilings['backbone']:.3f}" in told
    before = sorted(tmp_path.rglob("*"))
    assert command("dreambooth", *arguments)[:2] == (0, told.rpartition("Ceilings: ")[0])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", ["0", "-1"])
@pytest.mark.parametrize("line", ["dreambooth --ceilings --real builtin:", "controllable --images x --dataset x"])
def test_batches_hold_at_least_one_image(command: Command, line: str, size: str) -> None:
    name, *arguments = line.split()
    code, told, errors = command(name, *arguments, "--batch-size", size)
    assert (code, told) == (2, "")
    assert f"--batch-size: {size}: expected a whole number from 1" in errors


def test_runs_of_different_methods_are_not_averaged(finished_run: Path, tmp_path: Path, command: Command) -> None:
    """Refused before anything is drawn."""
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["instance_dir"] = "builtin:monster"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(other / "adapter")
    unet = load_base("tiny").unet
    attach(unet, METHODS["lora"]())
    save_adapter(unet, other / "adapter", base_model="tiny")
    arguments = ("--protocol", write_protocol(tmp_path), "--output", tmp_path / "out")
    code, _, errors = command("dreambooth", finished_run, other, *arguments)
    assert code == 2
    assert "robot and monster were drawn by different methods" in errors
    assert not (tmp_path / "out").exists()


def test_scenes_are_drawn_and_scored_from_a_run_and_from_a_folder(tmp_path: Path, command: Command) -> None:
    scenes = write_ade20k_splits(tmp_path / "scenes", {"training": range(2), "validation": range(10, 13)})
    base, run = load_base("tiny"), tmp_path / "run"
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    save_condition_encoder(encoder, run / "condition_encoder")
    save_condition_encoder(encoder, run / "checkpoints/step-000001/condition_encoder")
    config = {"base_model": "tiny", "adapter": {"method": "none"}, "data": {"dataset_dir": str(scenes)}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    protocol = write_map_protocol(tmp_path)
    code, told, _ = command("controllable", run, "--protocol", protocol, "--device", "cpu")
    assert code == 0
    drawn = run / "evaluation/tests-maps"
    assert f"Results: {drawn / 'results.json'}" in told
    first = Results.read(drawn)
    assert first.counts["images"] == 3
    assert "not_told" not in first.run
    # The pictures that the data set has, in a copy without captions: what can be reached.
    bare = Path(shutil.copytree(scenes, tmp_path / "bare"))
    shutil.rmtree(bare / "captions")
    for file in (scenes / "images/validation").iterdir():
        save_png(Image.open(file), tmp_path / "real" / f"{file.stem}.png")
    real = ("--images", tmp_path / "real", "--dataset", bare, "--protocol", protocol)
    assert command("controllable", *real)[0] == 0
    best = Results.read(tmp_path / "real")
    assert best.metrics["mIoU"].value == pytest.approx(best.ceilings["mIoU"])
    assert best.metrics["FID"].value == pytest.approx(0, abs=1e-6)
    assert best.metrics["mIoU"].value > first.metrics["mIoU"].value
    assert (
        command("controllable", run, "--all-checkpoints", "--protocol", protocol, "--output", tmp_path / "all")[0] == 0
    )
    assert Results.read(tmp_path / "all/step-000001").metrics == first.metrics


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dreambooth nowhere", "nowhere"),
        ("dreambooth --images nowhere --real x --protocol tinyworld/dreambooth-v1", "no such folder"),
        ("dreambooth --images x --real x --protocol dreambooth/oft-v2", "Did you mean 'dreambooth/oft-v1'"),
        ("controllable --images nowhere --dataset nowhere", "nowhere"),
        ("compare nowhere/results.json", "cannot be read"),
    ],
)
def test_what_is_the_users_to_mend_is_one_line(command: Command, line: str, message: str) -> None:
    name, *arguments = line.split()
    code, told, errors = command(name, *arguments)
    assert (code, told) == (2, "")
    assert errors.startswith(f"eval/{name}.py: ")
    assert message in errors
    assert len(errors.splitlines()) == 1

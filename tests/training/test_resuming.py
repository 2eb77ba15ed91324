"""Resuming: which checkpoint, with which settings, without which files, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.pictures import save_png
from ether_diffusion.training import controllable, dreambooth
from ether_diffusion.training.checkpoint import find_checkpoint, save_checkpoint
from ether_diffusion.training.loop import Trainer
from support.runs import assert_same_run, same

MakeConfig = Callable[..., Any]
QUICK = ("data.prior=null", "training.batch_size=1", "training.checkpoint_every=1")
CROP = "data.crop=center"
ADAPTER = "adapter/adapter_model.safetensors"


def write(root: Path, step: int, **keep: Any) -> Path:
    def save_weights(folder: Path) -> None:
        (folder / "adapter.txt").write_text(str(step))

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], momentum=0.9)
    return save_checkpoint(root, step, save_weights=save_weights, optimizer=optimizer, trained=None, trainer={}, **keep)


@pytest.mark.parametrize("keep", [{"keep_states": 1}, {"keep_states": 1, "keep_checkpoints": 1}])
def test_the_checkpoint_just_written_can_be_resumed_from_whatever_else_is_there(
    tmp_path: Path, keep: dict[str, int]
) -> None:
    later = write(tmp_path, 400, **keep)
    (later / "checkpoint.json").write_text("{")
    write(tmp_path, 250, **keep)
    found = find_checkpoint(tmp_path, True, lambda _: None)
    assert found is not None
    assert found.step == 250


def test_checkpoints_after_the_resumed_one_are_set_aside(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with keep_states=1, where a damaged last one would count as the one whose state is kept."""
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    dreambooth.run(make_config(run, *QUICK, "training.steps=3"))
    damaged = checkpoints / "step-000003" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    keep = ("training.keep_states=1", "training.keep_checkpoints=1")
    whole = make_config(run, *QUICK, *keep, "training.steps=4", "training.resume=step-000001")
    with pytest.raises(UserError, match="keeps no optimiser state any more"):
        dreambooth.run(whole)
    assert damaged.exists()  # a refusal moves nothing
    capsys.readouterr()
    dreambooth.run(make_config(run, *QUICK, *keep, "training.steps=4", "training.resume=true"))
    assert f"Set aside: step-000003, after step 2, into {checkpoints / 'set_aside'}." in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["set_aside", "step-000004"]
    assert (checkpoints / "set_aside/step-000003" / ADAPTER).exists()
    dreambooth.run(make_config(run, *QUICK, *keep, "training.steps=5", "training.resume=true"))
    dreambooth.run(make_config(tmp_path / "once", *QUICK, "training.steps=5"))
    assert same(run / ADAPTER, tmp_path / "once" / ADAPTER)


def test_another_precision_is_refused_from_config_or_launcher(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, more = tmp_path / "run", (*QUICK, "training.steps=2", "training.resume=true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    dreambooth.run(make_config(run, *QUICK, "training.steps=1"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match=r"training\.mixed_precision was 'bf16', is 'no'\.$"):
        dreambooth.run(make_config(run, *more))
    AcceleratorState._reset_state()
    dreambooth.run(make_config(run, *more, "training.mixed_precision=bf16"))  # the same, from the config


def test_a_checkpoint_of_an_earlier_version_is_accepted(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dreambooth.run(make_config(tmp_path, *QUICK, "training.steps=1"))
    path = tmp_path / "checkpoints/step-000001/checkpoint.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("mixed_precision") == "no"
    del manifest["own_sha256"], manifest["inputs"]
    path.write_text(json.dumps(manifest))
    dreambooth.run(make_config(tmp_path, *QUICK, "training.steps=2", "training.resume=true"))
    assert "has no digest: it is resumed unchecked" in capsys.readouterr().out


@pytest.mark.parametrize("written", ['"step": 250', '"momentum": 0.9', '"own_sha256": "'])
def test_a_changed_character_of_a_manifest_is_damage(tmp_path: Path, written: str) -> None:
    write(tmp_path, 100, keep_states=2)
    path = write(tmp_path, 250, keep_states=2) / "checkpoint.json"
    text, other = path.read_text(), {"0": "1", "9": "8", '"': '"a'}[written[-1]]
    assert written in text
    path.write_text(text.replace(written, written[:-1] + other))
    said: list[str] = []
    found = find_checkpoint(tmp_path, True, said.append)
    assert found is not None
    assert found.step == 100
    assert said == [f"{path.parent} is damaged: checkpoint.json is not what was written. Trying the one before."]


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", '{"sha256": []}', "[" * 10000, "\xff", ""])
def test_a_manifest_that_is_no_object_is_one_line(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, 100, keep_states=2) / "checkpoint.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"^training\.resume: none of the 1 checkpoints in"):
        find_checkpoint(tmp_path, True, lambda _: None)


def test_data_is_compared_by_content_and_paths_by_where_they_lead(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        save_png(Image.new("RGB", (64, 64), (k * 90, 80, 30)), Path(f"photos/{k}.png"))
    run = make_config(Path("run"), *QUICK, "training.steps=1", "data.instance_dir=photos", "data.cache=true", CROP)
    dreambooth.run(run)

    def resume(*overrides: str) -> None:
        again = (*QUICK, "training.resume=true", "data.cache=true", CROP)
        dreambooth.run(make_config(Path("run"), *again, *overrides))

    resume("training.steps=2", "data.instance_dir=photos/../photos/", "data.cache_dir=elsewhere")
    Path("photos").rename("moved")
    resume("training.steps=3", f"data.instance_dir={tmp_path}/moved")
    before = contents(Path("run"))
    save_png(Image.new("RGB", (64, 64), (3, 3, 3)), Path("moved/1.png"))
    with pytest.raises(UserError, match=r"with other settings: data\.instance_dir holds other files than it did"):
        resume("training.steps=4", "data.instance_dir=moved")
    assert contents(Path("run")) == before


def test_a_resumed_run_does_not_need_the_adapter_that_it_started_from(
    make_config: MakeConfig, finished_run: Path, tmp_path: Path
) -> None:
    first = Path(shutil.copytree(finished_run, tmp_path / "first"))
    warm = (*QUICK, f"adapter.init_from={first}")
    dreambooth.run(make_config(tmp_path / "once", *warm, "training.steps=2"))
    dreambooth.run(make_config(tmp_path / "twice", *warm, "training.steps=1"))
    shutil.rmtree(first)
    dreambooth.run(make_config(tmp_path / "twice", *warm, "training.steps=2", "training.resume=true"))
    assert same(tmp_path / "once" / ADAPTER, tmp_path / "twice" / ADAPTER)
    with pytest.raises(UserError, match="is not a folder"):  # where there is no checkpoint yet, it is needed
        dreambooth.run(make_config(tmp_path / "new", *warm, "training.steps=2", "training.resume=true"))


def test_a_resumed_controllable_run_needs_neither_adapter_nor_encoder(
    make_controllable: MakeConfig, tmp_path: Path
) -> None:
    first, one = tmp_path / "first", ("training.batch_size=1", "training.checkpoint_every=1")
    controllable.run(make_controllable(first, *one, "training.steps=1"))
    warm = (*one, f"adapter.init_from={first}")
    controllable.run(make_controllable(tmp_path / "once", *warm))
    controllable.run(make_controllable(tmp_path / "twice", *warm, "training.steps=1"))
    shutil.rmtree(first)
    controllable.run(make_controllable(tmp_path / "twice", *warm, "training.resume=true"))
    for name in (ADAPTER, "condition_encoder/diffusion_pytorch_model.safetensors"):
        assert same(tmp_path / "once" / name, tmp_path / "twice" / name)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("gone", "kept"),
    [
        (["checkpoints"], r"run/adapter holds trained weights"),
        (["checkpoints", "adapter"], r"metrics\.jsonl has 6 steps"),
        (["checkpoints", "adapter", "config.yaml"], r"metrics\.jsonl has 6 steps"),
    ],
)
@pytest.mark.parametrize("resume", ["true", "latest"])
def test_a_run_that_lost_its_checkpoints_is_refused_and_keeps_its_files(
    make_config: MakeConfig, finished_run: Path, tmp_path: Path, gone: list[str], kept: str, resume: str
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for path in (run / name for name in gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    settings = ("training.steps=6", "training.checkpoint_every=2", f"training.resume={resume}")
    with pytest.raises(
        UserError, match=rf"^training\.resume: .*{kept}, but .*/checkpoints has no checkpoint; "
    ) as error:
        dreambooth.run(make_config(run, *settings))
    assert str(error.value).endswith("Put the checkpoints back, or choose another output_dir.")
    assert "\n" not in str(error.value)
    assert contents(run) == before


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_keeps_its_files(
    make_config: MakeConfig, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for manifest in run.glob("checkpoints/*/checkpoint.json"):
        manifest.write_text("{")
    before = contents(run)
    with pytest.raises(UserError, match=r"none of the 3 checkpoints in .* can be resumed from\.$"):
        dreambooth.run(make_config(run, "training.steps=6", "training.resume=true"))
    assert contents(run) == before


@pytest.mark.parametrize("crash", ["before the first step", "before a checkpoint", "while it writes a checkpoint"])
def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    settings = ("data.prior=null", "training.batch_size=1", "training.steps=3", "training.checkpoint_every=2")
    run = make_config(tmp_path / "run", *settings, "training.resume=true")

    def fail(*_: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        step = {"before the first step": 1, "before a checkpoint": 2}.get(crash)
        if step is not None:
            take = Trainer._step
            patch.setattr(Trainer, "_step", lambda self, number, _: fail() if number == step else take(self, number, _))
        else:
            patch.setattr(dreambooth.DreamBoothTask, "save", fail)
        with pytest.raises(ArithmeticError):
            dreambooth.run(run)
    assert (tmp_path / "run/config.yaml").is_file()
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert (tmp_path / "run/metrics.jsonl").exists() == (crash != "before the first step")
    dreambooth.run(run)
    dreambooth.run(make_config(tmp_path / "once", *settings))
    assert_same_run(tmp_path / "once", tmp_path / "run", "step-000003")

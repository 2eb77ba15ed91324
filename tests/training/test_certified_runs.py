"""Runs certify what they save: a fault is one line and exit code 2, and what was trained is kept and marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ether_diffusion
from ether_diffusion.adapters.attach import adapted_layers
from ether_diffusion.adapters.certificate import CERTIFICATE
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import fingerprint, load_base
from ether_diffusion.training import controllable, dreambooth
from ether_diffusion.training.loop import Trainer
from ether_diffusion_cli import main
from support.runs import stopped_after, trained_weights, weights

MakeConfig = Callable[..., Any]
QUICK = ("data.prior=null", "training.batch_size=1", "training.steps=2", "training.checkpoint_every=1")
RATE_0 = "training.learning_rate=0"


def certificate(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CERTIFICATE).read_text())


def test_a_run_certifies_its_result_and_its_checkpoints(finished_run: Path) -> None:
    last = read_adapter(finished_run).certificate
    assert last is not None
    assert last.faults == {}
    assert (last.measured["layers"], last.measured["steps"], last.measured["share_below_1e-7"]) == (56, 6, 0)
    assert last.base == {"name": "tiny", "digest": fingerprint(load_base("tiny").unet), "dtype": "float32"}
    moved = []
    for step in (2, 4, 6):
        saved = read_adapter(finished_run / f"checkpoints/step-{step:06d}").certificate
        assert saved is not None
        assert (saved.faults, saved.measured["steps"]) == ({}, step)
        moved.append(saved.measured["largest_change"])
    assert moved == sorted(moved)
    assert saved == last


@pytest.mark.parametrize("steps", [4, 6])
def test_a_resumed_run_certifies_exactly_as_an_uninterrupted_one(
    make_config: MakeConfig, finished_run: Path, tmp_path: Path, steps: int
) -> None:
    run = stopped_after(finished_run, steps, tmp_path / "run")
    settings = ("training.batch_size=2", "training.steps=6", "training.checkpoint_every=2", "training.resume=true")
    more = ("training.tracker=tensorboard", "validation.prompts=[a qwe toy]", "validation.every=3")
    dreambooth.run(make_config(run, *settings, *more))
    assert (run / "adapter" / CERTIFICATE).read_bytes() == (finished_run / "adapter" / CERTIFICATE).read_bytes()


def test_a_checkpoint_of_an_earlier_version_is_resumed_and_blames_nobody(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *QUICK))
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
        del manifest["sha256"]["watched.safetensors"], manifest["own_sha256"]
        del manifest["settings"]["training"]["require_certificate"]
        (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
        (checkpoint / "watched.safetensors").unlink()
    dreambooth.run(make_config(tmp_path / "run", *QUICK, "training.resume=true"))  # all steps were taken before
    assert certificate(tmp_path / "run/adapter")["faults"] == {}


def test_rate_0_is_one_line_and_exit_code_2_and_discards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "dreambooth", "--config", "quickstart/dreambooth", "output_dir=run", *QUICK[:3], RATE_0]
    command += ["training.ema_decay=null", "validation.prompts=[]", "training.tracker=none"]
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ether-diffusion: ")]
    assert len(errors) == 1
    assert "run: the weights are written and marked as not certified: unmoved: 106 of 106 layers" in errors[0]
    assert trained_weights(Path("run"))
    for folder in ("run", "run/checkpoints/step-000002"):
        saved = read_adapter(folder).certificate
        assert saved is not None
        assert list(saved.faults) == ["unmoved"]

    assert main(["export", "run", "--output", "x.safetensors"]) == 2
    assert "run is not certified: unmoved: " in capsys.readouterr().err
    assert main(["export", "run", "--output", "x.safetensors", "--uncertified"]) == 0
    assert "note: the adapter changes the weights by" in capsys.readouterr().out
    generate = ["generate", "--adapter", "run", "--prompt", "a cup", "--steps", "1", "--output", "images"]
    assert main(generate) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "changes nothing measurable" in line]
    assert line.startswith(f"ether-diffusion: {Path('run/adapter')}: ")
    assert main(["inspect", "run"]) == 0
    assert "unmoved: 106 of 106 layers" in capsys.readouterr().out


def test_a_control_that_is_meant_to_do_nothing_ends_well_and_is_marked(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *QUICK, RATE_0, "training.require_certificate=false"))
    assert "Note:    " in capsys.readouterr().out
    assert list(certificate(tmp_path / "run/adapter")["faults"]) == ["unmoved"]
    with pytest.raises(UserError, match="--uncertified"):
        ether_diffusion.export(tmp_path / "run", "merged", tmp_path / "merged")


def test_layers_that_a_run_froze_by_mistake_are_named(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = dreambooth.DreamBoothTask.build

    def build_and_freeze(task: Any, *arguments: Any) -> None:
        build(task, *arguments)
        next(iter(adapted_layers(task.base.unet).values())).requires_grad_(False)

    monkeypatch.setattr(dreambooth.DreamBoothTask, "build", build_and_freeze)
    with pytest.raises(UserError, match=r"frozen: 1 of 56 layers \(unet\.\S+\) do not require gradients"):
        dreambooth.run(make_config(tmp_path / "run", *QUICK))


@pytest.mark.parametrize("wrap", ["compiled", "one compiled block"])
def test_names_in_a_file_are_the_bare_models_whatever_wraps_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: str
) -> None:
    start = Trainer.__init__

    def wrap_and_start(self: Any, task: Any, *arguments: Any) -> None:
        unet = task.module.unet
        if wrap == "compiled":
            task.module.unet = torch.compile(unet, backend="eager")
        else:
            unet.mid_block = torch.compile(unet.mid_block, backend="eager")
        start(self, task, *arguments)

    monkeypatch.setattr(Trainer, "__init__", wrap_and_start)
    dreambooth.run(make_config(tmp_path / "run", *QUICK))
    saved = read_adapter(tmp_path / "run")
    assert not any({"_orig_mod", "module", "base_layer"} & {*key.split(".")} for key in saved.tensors)
    assert saved.certificate is not None
    assert saved.certificate.faults == {}
    assert saved.certificate.measured["layers"] == 56


def test_the_text_encoders_adapter_is_certified_too(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "run", *QUICK, "adapter.text_encoder=true"))
    found = certificate(tmp_path / "run/adapter")
    assert found["faults"] == {}
    assert found["measured"]["layers"] == 56 + len(weights(tmp_path / "run", "adapter/text_encoder")) // 4
    assert any(path.startswith("text_encoder.") for path in found["measured"]["changes"])
    assert {"digest", "text_encoder_digest"} <= found["base"].keys()


def test_a_controllable_runs_encoder_is_certified_with_its_adapter(
    make_controllable: MakeConfig, tmp_path: Path
) -> None:
    controllable.run(make_controllable(tmp_path / "run"))
    for folder in ("adapter", "condition_encoder"):
        found = certificate(tmp_path / "run" / folder)
        assert found["faults"] == {}
        assert found["measured"]["changes_of_modules"]["condition_encoder"] > 1e-7
    still = ("training.learning_rate=0", "training.encoder_learning_rate=0")
    with pytest.raises(UserError, match="unmoved: 64 of 64 layers"):
        controllable.run(make_controllable(tmp_path / "still", *still))


@pytest.mark.parametrize("method", ["none", "controlnet"])
def test_runs_without_an_adapter_are_certified(make_controllable: MakeConfig, tmp_path: Path, method: str) -> None:
    settings = (f"adapter={{method: {method}}}", "training.learning_rate=0", "training.encoder_learning_rate=0")
    rates = settings[1:2] if method == "controlnet" else settings[1:]
    with pytest.raises(UserError, match="unmoved: 1 of 1 layers"):
        controllable.run(make_controllable(tmp_path / "still", settings[0], *rates))
    folder = "controlnet" if method == "controlnet" else "condition_encoder"
    assert list(certificate(tmp_path / "still" / folder)["faults"]) == ["unmoved"]
    controllable.run(make_controllable(tmp_path / "run", settings[0]))
    assert certificate(tmp_path / "run" / folder)["faults"] == {}

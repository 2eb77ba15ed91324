"""`training.compile` and `training.profile`: blocks compiled in place, and a trace of a few steps with their parts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ether_diffusion.errors import TrainingFailed, UserError
from ether_diffusion.files import digest_of_json
from ether_diffusion.training import dreambooth
from ether_diffusion.training.checkpoint import MANIFEST, OWN, read_checkpoint
from ether_diffusion.training.profiling import MODULE, PARTS
from support.runs import losses, trained_weights

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]
SHORT = ("data.prior=null", "training.checkpoint_every=2")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced as ever, and run by torch's own kernels: generated code takes a minute to compile."""
    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


def test_compiled_blocks_train_the_same_adapter_under_the_same_names(
    without_inductor: None, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dreambooth.run(make_config(tmp_path / "plain", *SHORT, "training.steps=2"))
    options = ("training.steps=2", "training.compile=true", "validation.prompts=[a toy]", "validation.sampling.steps=1")
    dreambooth.run(make_config(tmp_path / "compiled", *SHORT, *options))
    out = capsys.readouterr().out
    assert len(re.findall(r"Compiled: \d+ blocks, in the first step, which took \d+ s", out)) == 1
    plain, compiled = (trained_weights(tmp_path / name) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert not [key for key in compiled if "_orig_mod" in key]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    # An optimiser's first steps have the size of the rate, whatever the gradient: a last bit may turn one around.
    far = [(plain[key] - compiled[key]).abs() > 1e-3 for key in plain]
    assert sum(int(each.sum()) for each in far) < 0.01 * sum(each.numel() for each in far)
    again = make_config(tmp_path / "compiled", *SHORT, "training.steps=3", "training.resume=true")
    with pytest.raises(UserError, match=r"training\.compile was True, is False"):
        dreambooth.run(again)


def test_a_checkpoint_of_an_earlier_version_resumes_uncompiled(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its settings have no entry for what there was not."""
    dreambooth.run(make_config(tmp_path, *SHORT, "training.steps=2"))
    file = tmp_path / "checkpoints/step-000002" / MANIFEST
    manifest = json.loads(file.read_text())
    for name in ("compile", "log_every", "profile"):
        del manifest["settings"]["training"][name]
    for group in manifest["optimizer_groups"]:
        group["fused"] = None
    del manifest[OWN]
    manifest[OWN] = digest_of_json(manifest, sort_keys=True)
    file.write_text(json.dumps(manifest))
    assert not isinstance(read_checkpoint(file.parent), str)
    assert dreambooth.run(make_config(tmp_path, *SHORT, "training.steps=3", "training.resume=true")).steps_taken == 1


def test_what_torch_cannot_compile_is_one_line(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=no_compiler))
    with pytest.raises(TrainingFailed, match=r"training\.compile: torch cannot compile here \(.*no C\+\+ compiler"):
        dreambooth.run(make_config(tmp_path, *SHORT, "training.steps=1", "training.compile=true"))


def test_a_trace_has_the_steps_asked_for_and_their_parts(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *SHORT, "training.steps=5", "training.profile=2"))
    file = tmp_path / "run/logs/profile-000003.json"
    names = Counter(event.get("name") for event in json.loads(file.read_text())["traceEvents"])
    assert [names[part] for part in PARTS] == [2, 2, 2, 2]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Profile: "))
    assert str(file) in line
    shares = {part: float(line.split(f"{part} ")[1].split("%")[0]) for part in PARTS}
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert shares[MODULE] > 50


def test_a_run_that_ends_early_leaves_the_trace_of_the_steps_it_took(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "run", *SHORT, "training.steps=3", "training.profile=9"))
    trace = json.loads((tmp_path / "run/logs/profile-000003.json").read_text())
    assert sum(event.get("name") == MODULE for event in trace["traceEvents"]) == 1

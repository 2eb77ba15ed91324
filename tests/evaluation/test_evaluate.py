"""`evaluate` of a subject-driven run: the files that it writes, a rerun, and the runs that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation import quick_look
from ether_diffusion.evaluation.quick_look import evaluate, prompts_for
from ether_diffusion.generation import Sampling, read_run
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS


def test_a_rerun_keeps_the_images_and_gives_the_same_scores(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_look, "SAMPLING", Sampling(steps=1, guidance=1.0))
    prompts = prompts_for("builtin:robot", "qwe", "toy")[:3]
    monkeypatch.setattr(quick_look, "prompts_for", lambda *_: prompts)
    first = evaluate(read_run(finished_run), tmp_path, images_per_prompt=1)
    images = sorted((tmp_path / "after").glob("0*.png"))
    assert len(images) == len(list((tmp_path / "before").glob("0*.png"))) == 3
    times = [image.stat().st_mtime_ns for image in images]
    assert evaluate(read_run(finished_run), tmp_path, images_per_prompt=1) == first
    assert [image.stat().st_mtime_ns for image in images] == times
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["adapter"] == read_adapter(finished_run).digest
    assert saved["prompts"] == list(prompts)
    assert saved["scores"]["after"]["identity"] == pytest.approx(first.after.identity, abs=1e-5)
    assert saved["scores"]["photos"]["clip_t"] is None
    assert Image.open(first.contact_sheet).width > 3 * quick_look.CELL
    assert first.table().splitlines()[0] == "3 prompts, 1 images of each: dpm++, 1 steps, guidance 1, seed 0"
    assert first.note is None


def test_runs_that_the_scorers_cannot_score_are_refused(finished_run: Path, tmp_path: Path) -> None:
    adapter, lonely = finished_run / "adapter", tmp_path / "lonely"
    lonely.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lonely / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(UserError, match=r"is not in a run folder: no config\.yaml that states 'data\.instance_dir'"):
        evaluate(read_run(lonely), lonely / "evaluation")
    config = (lonely / "adapter_config.json").read_text()
    (lonely / "adapter_config.json").write_text(config.replace('"tiny"', '"some/base"'))
    with pytest.raises(UserError, match=r"was trained on some/base; the scorers know images of base 'tiny' only"):
        evaluate(read_run(lonely), lonely / "evaluation")
    assert not (lonely / "evaluation").exists()


def test_a_shipped_subject_has_its_own_prompts() -> None:
    assert list(prompts_for("builtin:robot", "qwe", "toy")) == list(SUBJECTS["robot"].prompts)


def test_own_photos_get_prompts_with_companions_of_other_classes() -> None:
    prompts = prompts_for("photos/my_cat", "qwe", "cat")
    assert len(prompts) == 10
    assert all("qwe cat" in prompt for prompt in prompts)
    assert not any("white cat" in prompt for prompt in prompts)

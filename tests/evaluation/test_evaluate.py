"""`evaluate`: what it writes, that a rerun repeats it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.adapters.storage import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation import quick_look as evaluation
from ether_diffusion.evaluation.quick_look import evaluate, prompts_for
from ether_diffusion.generation import Sampling
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS


def test_a_rerun_keeps_the_images_and_gives_the_same_scores(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SAMPLING", Sampling(steps=1, guidance=1.0))
    first = evaluate(finished_run, tmp_path, images_per_prompt=1)
    images = sorted((tmp_path / "after").glob("0*.png"))
    assert len(images) == len(list((tmp_path / "before").glob("0*.png"))) == 10
    times = [image.stat().st_mtime_ns for image in images]
    assert evaluate(finished_run, tmp_path, images_per_prompt=1) == first
    assert [image.stat().st_mtime_ns for image in images] == times
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["adapter"] == read_adapter(finished_run).digest
    assert saved["prompts"] == list(SUBJECTS["robot"].prompts)
    assert saved["scores"]["after"]["identity"] == pytest.approx(first.after.identity, abs=1e-5)
    assert saved["scores"]["photos"]["clip_t"] is None
    assert Image.open(first.contact_sheet).width > 10 * evaluation.CELL


def test_what_the_judges_cannot_know_is_refused(finished_run: Path, tmp_path: Path) -> None:
    adapter, lonely = finished_run / "adapter", tmp_path / "lonely"
    lonely.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lonely / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(UserError, match=r"lies in no run folder"):
        evaluate(lonely, lonely / "evaluation")
    config = (lonely / "adapter_config.json").read_text()
    (lonely / "adapter_config.json").write_text(config.replace('"tiny"', '"some/base"'))
    with pytest.raises(UserError, match=r"was trained on some/base; the judges know pictures of base 'tiny' alone"):
        evaluate(lonely, lonely / "evaluation")
    assert not (lonely / "evaluation").exists()


def test_own_photos_get_prompts_with_companions_of_other_classes() -> None:
    prompts = prompts_for("photos/my_cat", "qwe", "cat")
    assert len(prompts) == 10
    assert all("qwe cat" in prompt for prompt in prompts)
    assert not any("white cat" in prompt for prompt in prompts)

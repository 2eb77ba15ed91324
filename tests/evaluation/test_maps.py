"""`evaluate` of a controllable run: its scores, the files that it writes, and the runs that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation import quick_look
from ether_diffusion.evaluation.quick_look import evaluate_maps
from ether_diffusion.evaluation.quick_scores import score_scenes
from ether_diffusion.generation import ControllableSampling, read_run
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.module_files import save_module
from ether_diffusion.tinyworld.layouts import write_ade20k_splits
from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scenes import sample_scene
from ether_diffusion.tinyworld.scoring import load_scorers


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return write_ade20k_splits(folder, {"training": range(2), "validation": range(10, 14)})


def untrained_run(folder: Path, scenes: Path, base_model: str = "tiny") -> Path:
    """An encoder-only run before its first step: it generates the images of the base."""
    base = load_base("tiny")
    save_module(build_condition_encoder(base.unet, base.vae_factor), folder / "condition_encoder")
    config = {"base_model": base_model, "adapter": {"method": "none"}, "data": {"dataset_dir": str(scenes)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_renders_match_their_own_maps_and_no_others() -> None:
    images, labels = zip(*(render(sample_scene(seed)) for seed in range(40)), strict=True)
    found = score_scenes(load_scorers(), images, np.stack(labels))
    assert found.miou > 0.85
    assert found.pixel_accuracy > 0.95
    assert found.shuffled < 0.3


def test_an_untrained_encoder_changes_nothing_and_a_rerun_keeps_the_images(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_look, "MAP_SAMPLING", ControllableSampling(steps=1, guidance=1.0))
    run = read_run(untrained_run(tmp_path / "run", scenes))
    first = evaluate_maps(run, tmp_path / "out", scenes=3)
    assert first.after == first.before
    images = sorted((tmp_path / "out/after/images").glob("*.png"))
    assert [image.stem for image in images] == [f"ADE_val_{k:08d}" for k in (1, 2, 3)]
    times = [image.stat().st_mtime_ns for image in images]
    assert evaluate_maps(run, tmp_path / "out", scenes=3) == first
    assert [image.stat().st_mtime_ns for image in images] == times
    saved = json.loads((tmp_path / "out/scores.json").read_text())
    assert saved["scores"]["renders"]["miou"] == pytest.approx(first.real.miou, abs=1e-6)
    assert Image.open(first.contact_sheet).width > 4 * 64
    assert first.table().splitlines()[0] == "3 scenes of split 'validation': ddim, 1 steps, guidance 1, seed 0"
    other = evaluate_maps(run, tmp_path / "other", scenes=2, split="training")
    assert other.heading.startswith("2 scenes of split 'training'")
    assert json.loads((tmp_path / "other/scores.json").read_text())["split"] == "training"
    with pytest.raises(UserError, match=r"^evaluate: .*no split 'test'; it has .*--split names another split\.$"):
        evaluate_maps(run, tmp_path / "none", split="test")
    assert not (tmp_path / "none").exists()


def test_runs_that_the_scorers_cannot_score_are_refused(tmp_path: Path, scenes: Path) -> None:
    other = read_run(untrained_run(tmp_path / "other", scenes, base_model="some/base"))
    with pytest.raises(UserError, match=r"was trained on some/base; the scorers know images of base 'tiny' only"):
        evaluate_maps(other, tmp_path / "out")
    edges = tmp_path / "edges"
    for name in ("images", "conditions"):
        (edges / name / "validation").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(edges / name / "validation" / "a.png")
    (edges / "captions").mkdir()
    (edges / "captions/validation.jsonl").write_text(json.dumps({"image": "images/validation/a.png", "caption": "a"}))
    with pytest.raises(UserError, match="has no label maps of the miniature"):
        evaluate_maps(read_run(untrained_run(tmp_path / "run", edges)), tmp_path / "out")
    assert not (tmp_path / "out").exists()

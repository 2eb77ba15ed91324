"""Data that are not of the miniature's world are named once: in training, generating and scoring alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.data import builtin
from ether_diffusion.data.condition_kind import ConditionKind
from ether_diffusion.data.other_worlds import LOOKED_AT, conditions_note, pairs_note, photos_note
from ether_diffusion.data.pair_files import Pair
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion_cli import main

WORLDS = (64, 64)


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To render all of them takes a quarter of a minute."""
    monkeypatch.setattr(builtin, "SCENES", {"training": 3, "validation": 1})


def test_photos_are_of_the_world_by_size_and_class() -> None:
    """The miniature's world: renders of 64 x 64 pixels of eight classes."""
    assert photos_note("photos/dog", {WORLDS}, "dog") is None
    note = photos_note("photos/dog", {WORLDS, (640, 480)}, "dog")
    assert note is not None
    assert note.startswith("photos/dog (640 x 480 pixels) is not of the world of the base 'tiny'")
    assert "\n" not in note
    assert str(photos_note("photos/zebra", {WORLDS}, "zebra")).startswith("photos/zebra (class 'zebra') is not")


def test_pairs_are_of_the_world_by_their_first_images(few_scenes: None, tmp_path: Path) -> None:
    assert pairs_note(find_pairs("builtin:scenes", cache_dir=tmp_path / "cache", limit=3)) is None
    for name, size in (("small", WORLDS), ("large", (80, 48))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    small, large = (Pair(name, tmp_path / f"{name}.png", None) for name in ("small", "large"))
    own = Pairs("own", "training", (small,) * LOOKED_AT, "canny")
    assert pairs_note(own) is None
    assert str(pairs_note(replace(own, pairs=(small, large)))).startswith("own (80 x 48 pixels) is not of the world")
    assert pairs_note(replace(own, pairs=(*own.pairs, large))) is None  # is not opened


def test_maps_of_the_worlds_labels_may_have_any_size(few_scenes: None, tmp_path: Path) -> None:
    scenes = find_pairs("builtin:scenes", cache_dir=tmp_path / "cache", limit=1)
    Image.fromarray(np.zeros((128, 128), np.uint8)).save(tmp_path / "map.png")
    alone = Pair("map", None, tmp_path / "map.png")
    assert conditions_note("map.png", {(128, 128)}, ConditionKind.of(scenes)) is None
    assert pairs_note(replace(scenes, pairs=(alone,))) is None
    for other in (None, ConditionKind("canny"), ConditionKind("labels")):
        assert str(conditions_note("map.png", {(128, 128)}, other)).startswith("map.png (128 x 128 pixels) is not of")
    assert pairs_note(replace(scenes, pairs=(alone,), names=())) is not None


def test_training_and_generating_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("own/images", "own/conditions", "photos"):
        Path(folder).mkdir(parents=True)
        for name in ("a", "b"):
            Image.effect_noise((80, 64), 90.0).convert("RGB").save(f"{folder}/{name}.png")
    says = "is not of the world of the base 'tiny'"
    short = ["training.steps=1", "training.warmup_steps=0", "training.batch_size=1", "training.tracker=none"]
    own = ["data.dataset_dir=own", "data.caption_template=a photo", "data.split=training", "validation.split=null"]
    maps = ["train", "controllable", "--config", "quickstart/controllable", *short, *own, "validation.images=0"]
    assert main([*maps, "output_dir=maps"]) == 0
    assert capsys.readouterr().out.count(f"Note:    own (80 x 64 pixels) {says}") == 1
    subject = ["data.instance_dir=photos", "data.prior=null", "validation.prompts=[]", "output_dir=run"]
    assert main(["train", "dreambooth", "--config", "quickstart/dreambooth", *short, *subject]) == 0
    assert capsys.readouterr().out.count(f"Note:    photos (80 x 64 pixels) {says}") == 1

    generate = ["generate", "--adapter", "maps", "--steps", "1", "--output"]
    assert main([*generate, "one", "--condition", "own/conditions", "--prompt", "a red ball"]) == 0
    assert capsys.readouterr().err.count(f"own/conditions (80 x 64 pixels) {says}") == 1
    dataset = ["--dataset", "own", "--split", "training", "--caption-template", "a photo"]
    assert main([*generate, "two", *dataset]) == 0
    assert capsys.readouterr().err.count(f"own (80 x 64 pixels) {says}") == 1

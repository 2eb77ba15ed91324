"""The miniature on disk: read back, it is what was rendered; a folder is written whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.tinyworld import layouts
from ether_diffusion.tinyworld.builtin_subjects import render_photos
from ether_diffusion.tinyworld.render import LABELS, PALETTE, render
from ether_diffusion.tinyworld.scenes import sample_scene
from support.every_caption import captions

SEEDS = {"training": range(3, 9), "validation": range(20, 24)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_ade20k_splits(tmp_path_factory.mktemp("ade") / "tiny", SEEDS)  # pyright: ignore


@pytest.mark.parametrize(("name", "prefix"), [("training", "ADE_train"), ("validation", "ADE_val")])
def test_a_split_read_back_is_what_was_rendered(folder: Path, name: str, prefix: str):
    rows = [json.loads(line) for line in (folder / "captions" / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == len(SEEDS[name])
    for number, (seed, row) in enumerate(zip(SEEDS[name], rows, strict=True), 1):
        assert row["source"] == f"annotations/{name}/{prefix}_{number:08d}.png"
        assert row["target"] == f"images/{name}/{prefix}_{number:08d}.jpg"
        scene = sample_scene(seed)
        image, labels = render(scene)
        with Image.open(folder / row["source"]) as file:
            assert file.mode == "L"
            assert np.array_equal(np.asarray(file), labels)
        with Image.open(folder / row["target"]) as file:
            assert np.abs(np.asarray(file).astype(int) - np.asarray(image)).mean() < 4  # JPEG
        assert row["prompt"] in captions(scene, held_out=False)


def test_the_table_of_classes_counts_what_the_label_maps_hold(folder: Path):
    header, *rows = [line.split("\t") for line in (folder / "objectInfo23.txt").read_text().splitlines()]
    assert header == ["Idx", "Ratio", "Train", "Val", "Name"]
    assert [row[4] for row in rows] == list(LABELS[1:])
    assert [int(row[0]) for row in rows] == list(range(1, len(LABELS)))
    maps = {name: [np.asarray(Image.open(p)) for p in (folder / "annotations" / name).iterdir()] for name in SEEDS}
    for label, row in enumerate(rows, 1):
        assert [int(row[2]), int(row[3])] == [sum(bool((m == label).any()) for m in maps[name]) for name in SEEDS]
        share = np.mean([m == label for name in SEEDS for m in maps[name]])
        assert float(row[1]) == pytest.approx(share, abs=1e-4)


def test_the_palette(folder: Path):
    with (folder / "color23.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[int(row[key]) for key in ("red", "green", "blue")] for row in rows] == PALETTE[1:].tolist()
    assert [row["name"] for row in rows] == list(LABELS[1:])


def test_held_out_scenes_come_with_held_out_phrasings(tmp_path: Path):
    layouts.write_ade20k_splits(tmp_path / "x", {"validation": [5]}, split="held_out")
    (row,) = (tmp_path / "x/captions/validation.jsonl").read_text().splitlines()
    assert json.loads(row)["prompt"] in captions(sample_scene(5, "held_out"), held_out=True)


def test_a_photo_folder_equals_the_built_in_photos(tmp_path: Path):
    layouts.write_photo_folder(tmp_path / "robot", "robot")
    written = [photo.open().tobytes() for photo in find_photos(tmp_path / "robot").photos]
    assert written == [photo.open().tobytes() for photo in find_photos("builtin:robot").photos]
    assert written == [image.tobytes() for image in render_photos("robot")]


def test_bad_input_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("kept")
    for write in (
        lambda folder: layouts.write_ade20k_splits(folder, {"validation": [1]}),
        lambda f: layouts.write_photo_folder(f, "robot"),
    ):
        with pytest.raises(UserError, match=r"full is not empty\. Name another folder"):
            write(tmp_path / "full")
    with pytest.raises(UserError, match="split 'val'; expected 'training' or 'validation'"):
        layouts.write_ade20k_splits(tmp_path / "new", {"val": [1]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"no subject 'robbot'\. Did you mean 'robot'\?"):
        layouts.write_photo_folder(tmp_path / "new", "robbot")
    assert layouts.main(["--to", str(tmp_path / "new"), "--scenes", "0"]) == 2
    assert capsys.readouterr().err == "layouts: --scenes 0; expected at least 1\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="split 'test'"):
        layouts.write_ade20k_splits(tmp_path / "x", {"validation": [1]}, split="test")  # pyright: ignore
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path):
    assert layouts.main(["--to", str(tmp_path / "ade"), "--scenes", "2", "--split", "validation", "training"]) == 0
    names = sorted(path.name for path in (tmp_path / "ade/images").rglob("*.jpg"))
    assert names == [f"{prefix}_{k:08d}.jpg" for prefix in ("ADE_train", "ADE_val") for k in (1, 2)]
    (tmp_path / "cat").mkdir()  # empty: like absent
    assert layouts.main(["--to", str(tmp_path / "cat"), "--subject", "party_cat"]) == 0
    assert len(list((tmp_path / "cat").iterdir())) == 5

"""The check of pairs: silent on correct data; each fault is counted and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ether_diffusion_cli
from ether_diffusion.data.check import check_folder
from ether_diffusion.errors import UserError


def first(ade20k: Path, kind: str, split: str = "training") -> Path:
    return sorted((ade20k / kind / split).iterdir())[0]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def out_of_range(ade20k: Path) -> None:
    rewrite(
        first(ade20k, "annotations"),
        lambda labels: np.where(np.indices(labels.shape)[0] < 2, 99, labels).astype(np.uint8),
    )


def off_palette(ade20k: Path) -> None:
    path = first(ade20k, "annotations")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(path)


def as_jpeg(ade20k: Path) -> None:
    path = first(ade20k, "annotations")
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


def jpeg_in_disguise(ade20k: Path) -> None:
    path = first(ade20k, "annotations")
    Image.open(path).save(path, format="JPEG")


def another_size(ade20k: Path) -> None:
    Image.new("L", (64, 32)).save(first(ade20k, "annotations"))


def no_map(ade20k: Path) -> None:
    first(ade20k, "annotations").unlink()


def no_image(ade20k: Path) -> None:
    first(ade20k, "images").unlink()


def damaged_image(ade20k: Path) -> None:
    path = first(ade20k, "images")
    path.write_bytes(path.read_bytes()[:500])


def damaged_map(ade20k: Path) -> None:
    first(ade20k, "annotations").write_bytes(b"")


def change_first_caption(ade20k: Path, change: Callable[[str], str]) -> None:
    file = ade20k / "captions/training.jsonl"
    line, *others = file.read_text().splitlines(keepends=True)
    file.write_text(change(line) + "".join(others))


def empty_caption(ade20k: Path) -> None:
    change_first_caption(ade20k, lambda line: json.dumps({**json.loads(line), "prompt": " "}) + "\n")


def second_caption(ade20k: Path) -> None:
    change_first_caption(ade20k, lambda line: line + line)


def broken_line(ade20k: Path) -> None:
    change_first_caption(ade20k, lambda line: "{\n" + line)


def others_captions(ade20k: Path) -> None:
    shutil.copy(ade20k / "captions/validation.jsonl", ade20k / "captions/training.jsonl")


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (
            out_of_range,
            "maps with labels out of range (1): ADE_train_00000001.png: label 99 at x=0 y=0, 3.1% of the pixels",
        ),
        (off_palette, "maps with colours off the palette (1): ADE_train_00000001.png: colour (1, 2, 3) at x=0 y=0"),
        (as_jpeg, "maps as JPEG, which changes labels (1): ADE_train_00000001.jpg"),
        (jpeg_in_disguise, "maps as JPEG, which changes labels (1): ADE_train_00000001.png"),
        (another_size, "images and conditions of different sizes (1): ADE_train_00000001 64 x 64 and 64 x 32"),
        (no_map, "images without condition (1): ADE_train_00000001.jpg"),
        (no_image, "conditions without image (1): ADE_train_00000001.png"),
        (damaged_image, "damaged images (1): ADE_train_00000001.jpg: a damaged image"),
        (damaged_map, "damaged conditions (1): ADE_train_00000001.png: the file is empty"),
        (empty_caption, "empty captions (1): training.jsonl:1: an empty caption"),
        (
            second_caption,
            "second captions for one image (1): training.jsonl:2: a second caption for ADE_train_00000001",
        ),
        (broken_line, "lines of captions that cannot be used (1): training.jsonl:1: not a line of JSON"),
        (others_captions, "lines of captions that name no image here (4):"),
    ],
)
def test_each_fault_is_found_alone(ade20k: Path, harm: Callable[[Path], None], found: str):
    assert check_folder(ade20k).faults == 0
    harm(ade20k)
    findings = check_folder(ade20k)
    faults = [line for line in findings.lines() if "FAULT" in line]
    assert len(faults) == findings.faults == 1
    assert faults[0].startswith(f"  FAULT: {found}")
    assert findings.lines()[-1] == "1 kind of fault."


def test_a_clean_folder_is_described(scenes: Path):
    lines = check_folder(scenes).lines()
    assert lines[0] == f"{scenes}: ADE20K's layout, label maps of 23 classes, the palette of 23 classes"
    assert "split training: 6 images, 6 conditions, 6 pairs" in lines
    assert "split validation: 4 images, 4 conditions, 4 pairs" in lines
    assert "  sizes: 64 x 64" in lines
    assert "  captions: 6 of 6 images, from training.jsonl" in lines
    assert lines[-1] == "No faults."


def test_photos_of_a_subject_are_checked_without_a_word_of_conditions(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in (("a.png", (60, 40)), ("b.jpg", (80, 80))):
        Image.new("RGB", size, "red").save(photos / name)
    (photos / "notes.md").write_text("mine")
    findings = check_folder(photos)
    assert findings.faults == 0
    lines = findings.lines()
    assert lines[0] == f"{photos}: photos of a subject, for data.instance_dir"
    assert lines[2:6] == [
        "2 photos",
        "  sizes: 60 x 40 to 80 x 80",
        "  captions: none: the instance prompt is used for every photo",
        "  note: left out, for they are no photos (1): notes.md (not an image)",
    ]
    assert "condition" not in "\n".join(lines)
    assert findings.sheet().size > (80, 160)
    (photos / "a.txt").write_text("word " * 76)
    (photos / "b.txt").write_text(" ")
    (photos / "c.png").write_bytes(b"<html>")
    found = {one.what: one.count for one in check_folder(photos).splits[0].findings.values() if one.fault}
    assert found == {"empty captions": 1, "damaged images": 1}
    assert "note: captions of more than 75 words, whose end no text encoder reads (1): word word" in "\n".join(
        check_folder(photos).lines()
    )


def test_captions_that_a_base_cuts_are_counted_by_its_tokenizer(ade20k: Path, capsys: pytest.CaptureFixture[str]):
    change_first_caption(ade20k, lambda line: json.dumps({**json.loads(line), "prompt": "red " * 40}) + "\n")
    assert ether_diffusion_cli.main(["data", "check", str(ade20k), "--base-model", "tiny"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "exceed" in line)
    assert line.startswith("  note: 1 of 6 captions exceed the 38 tokens that the text encoder reads")
    assert "(40)" in line


def test_a_sheet_replaces_no_file_of_the_users(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    assert ether_diffusion_cli.main(["data", "check", str(scenes), "--sheet", str(mine)]) == 2
    assert "mine.png was not written by this program" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert ether_diffusion_cli.main(["data", "check", str(scenes), "--sheet", f"{tmp_path}/folder/"]) == 2
    for _ in range(2):
        assert ether_diffusion_cli.main(["data", "check", str(scenes), "--sheet", str(tmp_path / "sheet.png")]) == 0


def test_a_folder_without_photos_names_both_kinds_of_data(tmp_path: Path):
    with pytest.raises(UserError, match=r"no photos in this folder; expected a folder with 3 to 6 photos, or images/"):
        check_folder(tmp_path)


def test_the_shares_of_labels_are_those_of_the_pixels(scenes: Path):
    (split,) = check_folder(scenes, split="training").splits
    maps = np.stack([np.asarray(Image.open(path)) for path in (scenes / "annotations/training").iterdir()])
    assert split.pixels.tolist() == np.bincount(maps.ravel(), minlength=24).tolist()


def test_many_faults_are_counted_and_a_few_named(ade20k: Path):
    for path in (ade20k / "annotations/training").iterdir():
        rewrite(path, lambda labels: labels + np.uint8(200))
    (split,) = check_folder(ade20k, split="training").splits
    finding = split.findings["maps with labels out of range"]
    assert (finding.count, len(finding.examples)) == (6, 3)
    assert finding.lines()[0] == "FAULT: maps with labels out of range (6):"
    assert finding.lines()[-1] == "    ..."
    assert len(finding.lines()) == 5


def test_notes_are_not_faults(ade20k: Path):
    Image.new("L", (64, 64)).save(first(ade20k, "annotations"))
    exif = Image.Exif()
    exif[274] = 6
    path = first(ade20k, "images")
    Image.open(path).save(path, exif=exif)
    rows = (ade20k / "captions/training.jsonl").read_text().splitlines(keepends=True)
    (ade20k / "captions/training.jsonl").write_text("".join(rows[1:]))
    shutil.rmtree(ade20k / "images/validation")
    findings = check_folder(ade20k)
    assert findings.faults == 0
    text = "\n".join(findings.lines())
    assert "note: maps without a single label (1): ADE_train_00000001.png" in text
    assert (
        "note: images with an EXIF orientation, which is ignored, as ADE20K's own tools do (1): ADE_train_00000001"
        in text
    )
    assert "note: images without caption, where data.caption_template can fill in (1): ADE_train_00000001" in text
    assert "  no images at all: conditions to generate from, not to train on" in text


def test_other_folders(ade20k: Path, tmp_path: Path):
    photos = ade20k / "images/training"
    for path in photos.iterdir():
        path.with_suffix(".txt").write_text("words")
    (photos / "ADE_train_00000001.txt").write_text("")
    (photos / "other.txt").write_text("words")
    lines = check_folder(photos, condition="canny").lines()
    assert lines[0].endswith("photos, conditions computed from them by canny")
    assert "split training: 6 images" in lines
    assert "  captions: 5 of 6 images, from text files next to them" in lines
    assert any("FAULT: empty captions (1): ADE_train_00000001.txt: an empty caption" in line for line in lines)
    assert any("note: text files that belong to no image (1): other.txt" in line for line in lines)
    pairs = tmp_path / "pairs"
    shutil.copytree(photos, pairs / "images")
    shutil.copytree(photos, pairs / "conditions")
    assert check_folder(pairs).lines()[0].endswith("a folder of pairs, conditions are images")


def test_the_sheet_shows_image_condition_and_both(scenes: Path):
    page = check_folder(scenes).sheet(most=2)
    assert page.width > 3 * 256
    assert page.height > 2 * 256


def test_the_command(ade20k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    check = ["data", "check", str(ade20k)]
    assert ether_diffusion_cli.main([*check, "--sheet", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr()
    assert "No faults." in printed.out
    assert (tmp_path / "sheet.png").is_file()
    no_map(ade20k)
    assert ether_diffusion_cli.main([*check, "--split", "validation"]) == 0
    assert ether_diffusion_cli.main(check) == 2
    printed = capsys.readouterr()
    assert "1 kind of fault." in printed.out
    assert printed.err == f"ether-diffusion: {ade20k} has faults\n"
    assert ether_diffusion_cli.main(["data", "check", str(ade20k / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_split_that_is_not_there(scenes: Path):
    with pytest.raises(UserError, match=r"no split 'val'; it has training, validation"):
        check_folder(scenes, split="val")


def test_the_real_sample_has_no_faults(shared: Path):
    captions = shared / "data/ade20k_captions/validation_blip.jsonl"
    findings = check_folder(shared / "data/ade20k_sample/ADEChallengeData2016", captions=captions)
    assert findings.faults == 0
    text = "\n".join(findings.lines())
    assert "8 of 150 classes occur; most of all sky 41%, building 32%" in text
    assert "2 of 2 images, from validation_blip.jsonl" in text
    assert "row i is matched with ADE_val_(i + 1)" in text

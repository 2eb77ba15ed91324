"""Finding pairs: every layout as people have it, captions by name, and errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ether_diffusion.data import builtin
from ether_diffusion.data.pair_captions import own_captions
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import find_layout, matched
from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.data.palettes import ADE20K
from ether_diffusion.errors import UserError
from ether_diffusion.tinyworld.render import LABELS, PALETTE


def error_of(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        find_pairs(*arguments, **options)  # pyright: ignore
    return str(caught.value)


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_images(folder: Path, names: str, *, grey: int | None = None, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names.split()):
        colour = (250 - k, 9 * k, 3) if grey is None else grey
        Image.new("RGB" if grey is None else "L", (20, 16), colour).save(folder / f"{name}.{suffix}")


def captions_of(pairs) -> list[str]:
    return [pair.caption for pair in pairs.pairs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images, conditions that are photos, and a caption next to each image."""
    write_images(tmp_path / "set/images", "a b c")
    write_images(tmp_path / "set/conditions", "a b c")
    for name in "abc":
        (tmp_path / f"set/images/{name}.txt").write_text(f"  picture\n{name} \n")
    return tmp_path / "set"


@pytest.mark.parametrize("suffix", ["heic", "AVIF", "jxl"])
@pytest.mark.parametrize("condition", ["auto", "canny"])
def test_images_that_cannot_be_read_stop_a_run_as_photos_do(folder: Path, suffix: str, condition: str):
    (folder / f"images/d.{suffix}").write_bytes(b"\0\0\0\x18ftypheic")
    message = f"{folder}/images: 1 photos in a format that cannot be read: d.{suffix}; export them as JPEG or PNG"
    assert error_of(folder, condition=condition).startswith(message)


@pytest.mark.parametrize(("disk", "lines"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_form_of_their_letters(tmp_path: Path, disk: Any, lines: Any):
    on_disk, listed = (unicodedata.normalize(form, "Häuschen") for form in (disk, lines))
    write_images(tmp_path / "set/images", on_disk)
    write_images(tmp_path / "set/conditions", listed)
    for named in (f"images/{listed}.png", f"{listed}.png"):
        write_lines(tmp_path / "set/captions.jsonl", [{"image": named, "text": "a house"}])
        assert captions_of(find_pairs(tmp_path / "set")) == ["a house"]
    (tmp_path / "set/images").rename(tmp_path / "set/photos")
    (tmp_path / "set/conditions").rename(tmp_path / "set/maps")
    row = {"image": f"photos/{listed}.png", "condition": f"maps/{on_disk}.png", "text": "a house"}
    write_lines(tmp_path / "set/captions.jsonl", [row])
    assert captions_of(find_pairs(tmp_path / "set")) == ["a house"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("name", ["images/d.png", "conditions/d.txt", "captions.jsonl"])
def test_a_pipe_in_a_data_set_is_refused_and_not_opened(folder: Path, name: str):
    os.mkfifo(folder / name)
    assert f"{folder / name}: a named pipe; expected" in error_of(folder)


CAPTION = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@settings(max_examples=20)
@pytest.mark.parametrize("as_lines", [True, False])
@given(st.lists(CAPTION, min_size=5, max_size=5), st.booleans())
def test_any_caption_is_read_as_it_was_written(tmp_path: Path, as_lines: bool, texts: list[str], ascii_only: bool):
    """Texts of all planes, quotes, line separators and controls included, as JSON lines and as text files."""
    wanted = {f"{k:03d}": f'a{text}\u2028 "b\\' for k, text in enumerate(texts)}
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    write_images(tmp_path / "set/images", " ".join(wanted))
    write_images(tmp_path / "set/conditions", " ".join(wanted))
    if as_lines:
        rows = [{"image": f"images/{name}.png", "text": text} for name, text in wanted.items()]
        lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        (tmp_path / "set/captions.jsonl").write_text(lines, encoding="utf-8")
    else:
        for name, text in wanted.items():
            (tmp_path / f"set/images/{name}.txt").write_bytes(text.encode())
    assert captions_of(find_pairs(tmp_path / "set")) == [" ".join(text.split()) for text in wanted.values()]


def test_lines_may_begin_with_a_byte_order_mark(folder: Path):
    lines = write_lines(folder / "captions.jsonl", [{"image": f"{name}.png", "text": name} for name in "abc"])
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n"))
    assert captions_of(find_pairs(folder)) == ["a", "b", "c"]


def test_ade20ks_layout(scenes: Path):
    pairs = find_pairs(scenes, split="validation")
    assert (pairs.folder, pairs.split, pairs.kind, len(pairs)) == (str(scenes), "validation", "labels", 4)
    assert [pair.name for pair in pairs.pairs] == [f"ADE_val_{k:08d}" for k in range(1, 5)]
    first = pairs.pairs[0]
    assert first.image == scenes / "images/validation/ADE_val_00000001.jpg"
    assert first.condition == scenes / "annotations/validation/ADE_val_00000001.png"
    rows = [json.loads(line) for line in (scenes / "captions/validation.jsonl").read_text().splitlines()]
    assert captions_of(pairs) == [row["prompt"] for row in rows]
    assert np.array_equal(pairs.palette, PALETTE)  # pyright: ignore
    assert pairs.names == LABELS[1:]
    assert pairs.notes == ()
    assert [pair.name for pair in find_pairs(scenes, limit=2).pairs] == ["ADE_train_00000001", "ADE_train_00000002"]


def test_the_official_archive_unpacked_into_a_folder(scenes: Path, tmp_path: Path):
    shutil.copytree(scenes, tmp_path / "data/ADEChallengeData2016")
    (tmp_path / "data/ADEChallengeData2016/color23.csv").unlink()
    (tmp_path / "data/ADEChallengeData2016/objectInfo23.txt").unlink()
    pairs = find_pairs(tmp_path / "data")
    assert len(pairs) == 6
    assert np.array_equal(pairs.palette, ADE20K)  # pyright: ignore


def test_the_real_sample(shared: Path):
    sample, captions = shared / "data/ade20k_sample", shared / "data/ade20k_captions"
    pairs = find_pairs(sample, split="validation", captions=captions / "validation_blip.jsonl")
    assert captions_of(pairs) == ["a house", "an old building with a clock tower"]
    assert pairs.names[:2] == ("wall", "building, edifice")
    assert "row i is matched with ADE_val_(i + 1)" in pairs.notes[0]
    example = ControllableDataset(pairs, resolution=512).example(0)
    assert example["hint"].shape == (3, 512, 512)
    message = error_of(sample, split="validation", captions=captions / "training_blip.jsonl")
    assert "none of its 22,244 rows names one of the 2 pairs" in message
    assert "Rows that are only numbered do not identify their images" in message


def test_only_whole_numbered_captions_of_the_validation_split_are_matched_by_number(ade20k: Path, tmp_path: Path):
    rows = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"row {i}"} for i in range(2000)]
    whole = write_lines(tmp_path / "blip.jsonl", rows)
    pairs = find_pairs(ade20k, split="validation", captions=whole)
    assert captions_of(pairs) == ["row 0", "row 1", "row 2", "row 3"]
    assert pairs.notes[1] == "Captions: 1,996 of 2,000 rows in blip.jsonl name no image of this split"
    assert "none of its 2,000 rows names" in error_of(ade20k, captions=whole)
    part = write_lines(tmp_path / "part.jsonl", rows[:1999])
    assert "none of its 1,999 rows names" in error_of(ade20k, split="validation", captions=part)


def test_a_folder_of_pairs(folder: Path):
    pairs = find_pairs(folder)
    assert (pairs.kind, pairs.palette, captions_of(pairs)) == ("image", None, ["picture a", "picture b", "picture c"])
    assert pairs.pairs[1].condition == folder / "conditions/b.png"
    sample = ControllableDataset(pairs, resolution=16).example(1)
    assert sample["hint"].mean(dim=(1, 2)).tolist() == pytest.approx([249 / 255, 9 / 255, 3 / 255], abs=1e-6)


@pytest.mark.parametrize(("images", "conditions"), [("target", "source"), ("images", "conditioning_images")])
def test_other_names_of_the_folders(folder: Path, images: str, conditions: str):
    """ControlNet's tutorial has source/, target/ and prompt.json; diffusers' examples have conditioning_images/."""
    (folder / "images").rename(folder / images)
    (folder / "conditions").rename(folder / conditions)
    for name in "abc":
        (folder / f"{images}/{name}.txt").unlink()
    rows = [{"source": f"{conditions}/{n}.png", "target": f"{images}/{n}.png", "prompt": n} for n in "bca"]
    write_lines(folder / "prompt.json", rows)
    assert captions_of(find_pairs(folder)) == ["a", "b", "c"]


def test_splits_of_a_folder_of_pairs(folder: Path):
    (folder / "images/thumbnails").mkdir()  # next to the files: no split
    assert len(find_pairs(folder)) == 3
    assert error_of(folder, split="validation") == (
        f"{folder}: no split 'validation'; it has training, because its folders hold files, not folders of splits."
    )
    for kind in ("images", "conditions"):
        write_images(folder / f"split/{kind}/training", "a b")
        write_images(folder / f"split/{kind}/validation", "a")
    rows = [{"image": f"images/{split}/a.png", "text": split} for split in ("training", "validation")]
    write_lines(folder / "split/metadata.jsonl", [*rows, {"image": "images/training/b.png", "text": "b"}])
    assert captions_of(find_pairs(folder / "split")) == ["training", "b"]
    assert captions_of(find_pairs(folder / "split", split="validation")) == ["validation"]
    assert "Did you mean 'training'?" in error_of(folder / "split", split="trainig")


def test_lines_that_name_image_and_condition(folder: Path):
    (folder / "images").rename(folder / "pictures")
    (folder / "conditions").rename(folder / "edges")
    rows = [{"file_name": f"pictures/{n}.png", "conditioning_image": f"edges/{n}.png", "text": n} for n in "cab"]
    write_lines(folder / "metadata.jsonl", rows)
    pairs = find_pairs(folder)
    assert captions_of(pairs) == ["a", "b", "c"]
    assert pairs.pairs[2].condition == folder / "edges/c.png"
    assert error_of(folder, split="validation") == (
        f"{folder}: no split 'validation': no validation.jsonl next to metadata.jsonl"
    )
    write_lines(folder / "metadata.jsonl", [{**rows[0], "conditioning_image": "edges/z.png"}])
    assert error_of(folder) == f"{folder}/metadata.jsonl:1: edges/z.png: no such file in {folder}"
    write_lines(folder / "metadata.jsonl", [{"file_name": "pictures/a.png", "text": "a"}])
    assert "metadata.jsonl:1: names no image and condition" in error_of(folder)


def test_photos_alone_need_a_preprocessor(folder: Path):
    shutil.rmtree(folder / "conditions")
    assert "images without conditions; expected images/ and annotations/" in error_of(folder)
    for place in (folder, folder / "images"):
        pairs = find_pairs(place, condition="canny")
        assert (pairs.kind, [pair.condition for pair in pairs.pairs]) == ("canny", [None] * 3)
        assert captions_of(pairs) == ["picture a", "picture b", "picture c"]


def test_a_preprocessor_may_replace_maps(scenes: Path):
    pairs = find_pairs(scenes, condition="canny")
    assert (pairs.kind, len(pairs), pairs.palette) == ("canny", 6, None)
    assert all(pair.condition is None for pair in pairs.pairs)
    assert all(pair.caption for pair in pairs.pairs)


def test_grey_maps_without_a_palette_are_the_users_to_name(folder: Path):
    shutil.rmtree(folder / "conditions")
    write_images(folder / "conditions", "a b c", grey=4)
    assert "label maps, or dark images? Give data.condition=labels" in error_of(folder)
    assert find_pairs(folder, condition="image").kind == "image"
    pairs = find_pairs(folder, condition="labels")
    assert (pairs.kind, pairs.ignore_exif) == ("labels", False)
    assert np.array_equal(pairs.palette, ADE20K)  # pyright: ignore
    (folder / "color2.csv").write_text("class,red,green,blue,name\n1,9,9,9,a\n2,8,8,8,b\n")
    assert (find_pairs(folder).kind, find_pairs(folder).names) == ("labels", ("a", "b"))


def test_maps_painted_with_ade20ks_palette_are_recognised(folder: Path):
    for name in "abc":
        Image.fromarray(ADE20K[np.arange(320).reshape(16, 20) % 151]).save(folder / f"conditions/{name}.png")
    assert find_pairs(folder).kind == "labels"
    Image.new("RGB", (20, 16), (1, 2, 3)).save(folder / "conditions/b.png")
    assert find_pairs(folder).kind == "image"


def test_maps_alone_are_conditions_to_generate_from(ade20k: Path):
    shutil.rmtree(ade20k / "images/validation")
    pairs = find_pairs(ade20k, split="validation")
    assert [pair.image for pair in pairs.pairs] == [None] * 4
    assert pairs.notes == (f"{ade20k}: no images in split 'validation': conditions to generate from",)


def test_unpaired_files_are_counted_and_named(ade20k: Path):
    for k in (1, 2, 3, 4):
        (ade20k / f"annotations/training/ADE_train_0000000{k}.png").unlink()
    (ade20k / "images/training/ADE_train_00000006.jpg").unlink()
    lines = error_of(ade20k).splitlines()
    names = "ADE_train_00000001.jpg, ADE_train_00000002.jpg, ADE_train_00000003.jpg, ..."
    assert lines == [
        f"{ade20k}/images/training: 4 of 5 images without condition: {names}; `ether-diffusion data check` lists all",
        f"{ade20k}/annotations/training: 1 of 2 conditions without image: ADE_train_00000006.png; "
        "`ether-diffusion data check` lists all",
    ]


def test_label_maps_as_jpeg(ade20k: Path):
    for path in sorted((ade20k / "annotations/training").iterdir())[:2]:
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert error_of(ade20k) == (
        f"{ade20k}/annotations/training: 2 label maps as JPEG, which changes labels: ADE_train_00000001.jpg, "
        "ADE_train_00000002.jpg; expected PNG"
    )


def test_captions_missing_with_and_without_a_template(ade20k: Path):
    (ade20k / "captions/training.jsonl").unlink()
    assert "no captions; expected captions/training.jsonl in" in error_of(ade20k)
    pairs = find_pairs(ade20k, caption_template="a drawing")
    assert (set(captions_of(pairs)), pairs.notes) == ({"a drawing"}, ())
    (ade20k / "images/training/ADE_train_00000002.txt").write_text("seen")
    assert error_of(ade20k) == (
        f"{ade20k}: 5 of 6 images have no caption: ADE_train_00000001, ADE_train_00000003, ADE_train_00000004, ...; "
        "add them, or give data.caption_template"
    )
    pairs = find_pairs(ade20k, caption_template="{name}")
    assert captions_of(pairs)[:3] == ["ADE_train_00000001", "seen", "ADE_train_00000003"]
    assert pairs.notes == ("Captions: the template fills in for 5 of 6 images",)


def test_templates_take_scenes_from_ade20ks_list(ade20k: Path):
    (ade20k / "captions/training.jsonl").unlink()
    template = "a photo of a {scene}"
    assert "sceneCategories.txt: no such file; {scene} in" in error_of(ade20k, caption_template=template)
    names = [f"ADE_train_0000000{k}" for k in range(1, 7)]
    (ade20k / "sceneCategories.txt").write_text("".join(f"{name} dining_room\n" for name in names))
    assert captions_of(find_pairs(ade20k, caption_template=template)) == ["a photo of a dining room"] * 6
    (ade20k / "sceneCategories.txt").write_text("ADE_train_00000001 street\n")
    assert "no scene for 5 images: ADE_train_00000002" in error_of(ade20k, caption_template=template)
    assert "unknown {scnee}; known: {name}, {scene}. Did you mean 'scene'?" in error_of(
        ade20k, caption_template="a {scnee}"
    )
    assert "expected '}'" in error_of(ade20k, caption_template="a {scene")
    assert "data.caption_template: empty" in error_of(ade20k, caption_template=" ")
    for template in ("{}", "{0}", "{name.x}", "{name[a]}", "{name!z}", "{name:d}"):
        assert error_of(ade20k, caption_template=template).startswith(f"data.caption_template: {template!r}: ")


def test_text_files_in_a_folder_of_their_own(folder: Path, tmp_path: Path):
    (tmp_path / "words").mkdir()
    for name in "abc":
        (tmp_path / f"words/{name}.txt").write_text(f"other {name}")
    assert captions_of(find_pairs(folder, captions=tmp_path / "words")) == ["other a", "other b", "other c"]
    (tmp_path / "words/b.txt").write_text("\n")
    assert error_of(folder, captions=tmp_path / "words") == (
        f"{tmp_path}/words/b.txt: an empty caption; write one, or delete the file"
    )
    assert "words2: no such file or folder" in error_of(folder, captions=tmp_path / "words2")


def test_empty_captions_of_a_data_set_count_as_missing_and_unreadable_ones_are_refused(folder: Path):
    """As `data caption` reads them: it captions the images that have none."""
    files = matched(*find_layout(folder).of_split("training"))
    assert own_captions(files, folder, "training") == {name: f"picture {name}" for name in "abc"}
    (folder / "images/b.txt").write_text(" ")
    assert own_captions(files, folder, "training") == {name: f"picture {name}" for name in "ac"}
    (folder / "images/c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"c\.txt: not UTF-8 text"):
        own_captions(files, folder, "training")
    write_lines(folder / "captions.jsonl", [{"image": "a.png", "text": "a"}, {"image": "b.png", "text": ""}])
    assert own_captions(files, folder, "training") == {"a": "a"}


def test_faulty_lines(folder: Path):
    file = folder / "captions.jsonl"
    file.write_text(
        '{"image": "a.png", "text": "a"}\n\n[1]\n{"image": "b.png"\n{"image": "b.png"}\n{"image": 3, "text": "c"}\n'
    )
    lines = error_of(folder).splitlines()
    assert lines[0] == f"{file}:3: expected an object with prompt, caption, text, got [1]"
    assert lines[1].startswith(f"{file}:4: not a line of JSON")
    assert lines[2].startswith(f"{file}:5: has image; expected one of image, target, file_name")
    assert lines[3] == f"{file}:6: expected texts, got 3"
    rows = [{"image": f"{name}.png", "text": name} for name in "abc"]
    write_lines(file, [*rows, {"image": "b.png", "text": "again"}])
    assert error_of(folder) == f"{file}:4: a second caption for b; expected one per pair"
    write_lines(file, [*rows[:2], {"image": "c.png", "text": " "}])
    assert error_of(folder) == f"{file}:3: an empty caption"
    file.write_text("")
    assert error_of(folder) == f"{file}: no lines"
    file.write_bytes(b'{"image": "a.png", "text": "caf\xe9"}\n')
    assert error_of(folder) == f"{file}: not UTF-8 text (line 1)"
    line_break = {"image": "a.png", "text": "one\u2028line"}
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (line_break, *rows[1:])))
    assert captions_of(find_pairs(folder)) == ["one line", "b", "c"]


def test_folders_that_are_none(folder: Path):
    assert f"{folder}s: no such folder. Did you mean 'set'? Expected images/ and annotations/" in error_of(f"{folder}s")
    assert "a.txt: a file, not a folder." in error_of(folder / "images/a.txt")
    (folder / "images/a.jpg").write_bytes((folder / "images/a.png").read_bytes())
    assert error_of(folder) == f"{folder}/images: a.jpg and a.png have the same name; remove one of them"
    assert error_of(folder, limit=0) == "limit: 0, expected at least 1, or null"
    assert "preprocessor 'cany' is not known. Did you mean 'canny'?" in error_of(folder, condition="cany")
    assert "no built-in pairs 'builtin:scene'. Did you mean 'builtin:scenes'?" in error_of("builtin:scene")


def test_condition_image_is_no_way_to_read_label_maps(scenes: Path):
    assert "expected auto, labels or a preprocessor" in error_of(scenes, condition="image")


def test_the_built_in_scenes_are_rendered_once_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builtin, "SCENES", {"training": 3, "validation": 2})
    pairs = find_pairs("builtin:scenes", cache_dir=tmp_path)
    assert (pairs.folder, len(pairs), pairs.kind) == ("builtin:scenes", 3, "labels")
    assert len(find_pairs("builtin:scenes", split="validation", cache_dir=tmp_path)) == 2
    (kept,) = (tmp_path / "scenes").iterdir()
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    find_pairs("builtin:scenes", cache_dir=tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in kept.rglob("*")}

    (kept / "captions/mine.jsonl").write_text("")  # a user's file
    find_pairs("builtin:scenes", cache_dir=tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())
    captions = kept / "captions/training.jsonl"
    for damaged in (captions, next(kept.glob("images/training/*")), next(kept.glob("annotations/training/*"))):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        builtin._matches.cache_clear()  # as in the next process
        find_pairs("builtin:scenes", cache_dir=tmp_path)
        assert damaged.read_bytes() == whole

    def fails(folder: Path, *_, **__):
        (folder / "half").touch()
        raise OSError("no space")

    shutil.rmtree(kept)
    monkeypatch.setattr(builtin, "fill_ade20k_folder", fails)
    with pytest.raises(OSError, match="no space"):
        find_pairs("builtin:scenes", cache_dir=tmp_path)
    assert not list((tmp_path / "scenes").iterdir())

"""Captions and masks of photos, and the messages when they do not fit."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.data.captions import photo_captions
from ether_diffusion.data.masks import read_masks
from ether_diffusion.data.photos import find_photos
from ether_diffusion.data.subjects import find_subject
from ether_diffusion.errors import UserError


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a.jpg": (60, 40), "b.png": (40, 60), "c.d.png": (50, 50)}.items():
        Image.new("RGB", size, "red").save(folder / name)
    return folder


@pytest.fixture
def masks(tmp_path, photos) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, size in {"a.png": (30, 20), "b.jpg": (40, 60), "c.d.png": (50, 50)}.items():
        Image.new("L", size, 200).save(folder / name)
    return folder


def fault(read, *args) -> str:
    with pytest.raises(UserError) as caught:
        read(*args)
    return str(caught.value)


def test_captions_match_by_stem_and_the_rest_is_noted(photos):
    (photos / "a.txt").write_bytes(b"\xef\xbb\xbf a qwe dog\r\non a b\xc3\xb4at\n")
    (photos / "c.d.TXT").write_text("a qwe dog")
    (photos / "bb.txt").write_text("?")
    (photos / ".b.txt").write_text("hidden")
    captions = photo_captions(find_photos(photos))
    assert captions.by_name == {"a.jpg": "a qwe dog on a bôat", "c.d.png": "a qwe dog"}
    assert captions.notes == [
        "Captions: 2 of 3 photos have one; the instance prompt is used for b.png",
        "Captions: no photo matches bb.txt. Did you mean 'b'?",
    ]


def test_empty_and_unreadable_captions_are_all_named(photos):
    (photos / "a.txt").write_text(" \n")
    (photos / "b.txt").write_bytes(b"caf\xe9")
    (photos / "c.d.txt").write_text("fine")
    assert fault(photo_captions, find_photos(photos)).splitlines() == [
        f"{photos}/a.txt: an empty caption; write one, or delete the file",
        f"{photos}/b.txt: not UTF-8 text (line 1)",
    ]


@pytest.mark.parametrize(("photo", "text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_form_of_their_letters(tmp_path, photo, text):
    """macOS writes the umlaut as two characters, Linux and Windows as one."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / unicodedata.normalize(photo, "Häuschen.png"))
    (tmp_path / unicodedata.normalize(text, "Häuschen.txt")).write_bytes(b"\xef\xbb\xbfa qwe house\r\n")
    (tmp_path / "masks").mkdir()
    Image.new("L", (30, 20), 255).save(tmp_path / "masks" / unicodedata.normalize(text, "Häuschen.png"))
    found = find_photos(tmp_path)
    assert list(photo_captions(found).by_name.values()) == ["a qwe house"]
    assert len(read_masks(tmp_path / "masks", found)[0]) == 1


def test_no_captions_at_all(photos):
    assert "no photo in" in fault(photo_captions, find_photos(photos))
    assert "expected text files such as a.txt" in fault(photo_captions, find_photos(photos))
    assert "builtin:robot is not a folder" in fault(photo_captions, find_photos("builtin:robot"))


def test_masks_by_stem(photos, masks):
    Image.new("L", (9, 9), 255).save(masks / "x.png")
    read, notes = read_masks(masks, find_photos(photos))
    assert {name: (mask.mode, mask.size) for name, mask in read.items()} == {
        "a.jpg": ("L", (30, 20)),
        "b.png": ("L", (40, 60)),
        "c.d.png": ("L", (50, 50)),
    }
    assert read["a.jpg"].getpixel((0, 0)) == 200
    assert notes == ["Masks: no photo matches x.png"]


def test_the_exif_orientation_of_masks_is_applied(photos, masks):
    """The stored pixels lie on their side."""
    upright = Image.new("L", (40, 60), 0)
    upright.paste(255, (0, 0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    (masks / "b.jpg").unlink()
    upright.transpose(Image.Transpose.ROTATE_90).save(masks / "b.png", exif=exif)
    mask = read_masks(masks, find_photos(photos))[0]["b.png"]
    assert mask.tobytes() == upright.tobytes()


def test_faulty_masks_are_all_named(photos, masks):
    (masks / "a.png").unlink()
    Image.new("L", (60, 40), 200).save(masks / "b.jpg")
    Image.new("L", (50, 50), 0).save(masks / "c.d.png")
    assert fault(read_masks, masks, find_photos(photos)).splitlines() == [
        f"{masks}: no mask for a.jpg; expected files such as a.png",
        f"{masks}/b.jpg: the mask is 60 x 40, its photo 40 x 60: not the same proportions (b.png)",
        f"{masks}/c.d.png: the mask is completely black, so that its photo would not count at all (c.d.png)",
    ]


def test_ambiguous_and_transparent_masks(photos, masks):
    Image.new("L", (60, 40), 200).save(masks / "a.webp")
    Image.new("RGBA", (50, 50), (255, 255, 255, 100)).save(masks / "c.d.png")
    assert fault(read_masks, masks, find_photos(photos)).splitlines() == [
        f"{masks}: two masks for a.jpg: a.png, a.webp",
        f"{masks}/c.d.png: a mask with transparency; expected grey: white counts, black does not (c.d.png)",
    ]


def test_an_opaque_alpha_channel_is_no_transparency(photos, masks):
    Image.new("RGBA", (50, 50), (200, 200, 200, 255)).save(masks / "c.d.png")
    assert read_masks(masks, find_photos(photos))[0]["c.d.png"].getpixel((0, 0)) == 200


def test_photos_are_not_their_own_masks(photos):
    assert "holds the photos; expected another folder" in fault(read_masks, photos, find_photos(photos))


def test_a_subject_has_photos_captions_masks_and_one_note(photos, masks):
    (photos / "a.txt").write_text("a qwe dog on a boat")
    (photos / "readme").write_text("no image")
    subject = find_subject(photos, "a photo of qwe dog", class_prompt="a photo of dog", captions=True, masks=masks)
    assert subject.captions == {"a.jpg": "a qwe dog on a boat"}
    assert subject.masks is not None
    assert set(subject.masks) == {"a.jpg", "b.png", "c.d.png"}
    assert subject.photos.skipped == (("readme", "not an image"),)
    assert len(subject.notes) == 1
    plain = find_subject(photos, "a photo of qwe dog")
    assert (plain.captions, plain.masks, plain.notes) == ({}, None, ())
    assert ("a.txt", "not an image") in plain.photos.skipped

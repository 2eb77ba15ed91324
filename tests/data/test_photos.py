"""Photos as people have them: every format, every kind of junk, every kind of damage."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ether_diffusion.data.frames import Frame
from ether_diffusion.data.photos import find_photos, open_photo, resize, to_pixels
from ether_diffusion.errors import UserError

SHARED = Path(os.environ.get("ETHER_DIFFUSION_SHARED", Path(__file__).parents[3] / "shared"))
SUBJECTS = SHARED / "data" / "dreambooth" / "dataset"
HEIC_START = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
# The transposition of the stored pixels that each EXIF orientation undoes.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()).resize((150, 100))


def difference(a: Image.Image, b: Image.Image) -> float:
    """The mean difference in levels of 255."""
    assert a.mode == b.mode == "RGB"
    assert a.size == b.size
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_photos(folder)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
def test_formats(cat, tmp_path, suffix):
    path = tmp_path / f"cat.{suffix}"
    cat.save(path, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    assert difference(open_photo(path), cat) < (6 if suffix == "gif" else 3)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(cat, tmp_path, suffix, orientation):
    turn = STORED[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"cat.{suffix}"
    stored = cat if turn is None else cat.transpose(turn)
    stored.save(path, exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    assert difference(open_photo(path), cat) < 3


def test_mpo_gives_its_first_frame(cat, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    stored, path = cat.transpose(Image.Transpose.ROTATE_90), tmp_path / "cat.jpg"
    other = Image.new("RGB", stored.size, "blue")
    stored.save(path, format="MPO", save_all=True, append_images=[other], exif=exif, quality=95)
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert difference(open_photo(path), cat) < 4


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first(cat, tmp_path, suffix):
    path = tmp_path / f"cat.{suffix}"
    cat.save(path, save_all=True, append_images=[Image.new("RGB", cat.size, "blue")])
    assert difference(open_photo(path), cat) < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((200, 0, 0, 0), (0, 0, 2, 2))
    path = tmp_path / f"x.{'tiff' if mode == 'PA' else 'png'}"
    if mode == "P":
        flat = Image.new("P", (4, 2), 1)
        flat.putpalette([200, 0, 0, 0, 0, 0])
        flat.paste(0, (0, 0, 2, 2))
        flat.save(path, transparency=0)
    else:
        image.convert(mode).save(path)
    opened = open_photo(path)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((3, 0)) == (0, 0, 0)


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "x.png")
    assert open_photo(tmp_path / "x.png").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(cat, tmp_path, suffix):
    path = tmp_path / f"cat.{suffix}"
    cat.convert("CMYK").save(path, **({"quality": 95} if suffix == "jpg" else {}))
    assert difference(open_photo(path), cat) < 3


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greys_become_three_equal_channels(cat, tmp_path, mode):
    cat.convert(mode).save(tmp_path / "x.png")
    channels = np.asarray(open_photo(tmp_path / "x.png"))
    assert (channels == np.asarray(cat.convert(mode).convert("L"))[..., None]).all()


@pytest.mark.parametrize(
    ("name", "dtype", "white"),
    [
        ("x.png", np.uint16, 65535),
        ("x.tiff", np.uint16, 65535),
        ("x.tiff", np.int32, 65535),
        ("x.tiff", np.int32, 2**31 - 1),
        ("x.tiff", np.float32, 1),
        ("x.tiff", np.float32, 255),
        ("x.tiff", np.float32, 65535),
    ],
)
def test_deep_greys_are_scaled_not_clipped(cat, tmp_path, name, dtype, white):
    grey = np.asarray(cat.convert("L"), dtype=np.float64)
    grey = (grey - grey.min()) / (grey.max() - grey.min())  # from black to white
    Image.fromarray((grey * white).astype(dtype)).save(tmp_path / name)
    opened = np.asarray(open_photo(tmp_path / name), dtype=float)
    assert np.abs(opened - grey[..., None] * 255).max() <= 0.51


def test_a_dark_16_bit_grey_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "x.png")
    assert open_photo(tmp_path / "x.png").getpixel((0, 0)) == (1, 1, 1)


def test_an_embedded_profile_is_converted_to_srgb(tmp_path):
    """The profile swaps red and green, which no rounding can imitate."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {profile[i : i + 4]: i for i in range(132, 132 + 12 * 20, 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped = bytearray(profile.replace("sRGB".encode("utf-16-be"), "Mine".encode("utf-16-be")))
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "x.png", icc_profile=bytes(swapped))
    r, g, b = np.asarray(open_photo(tmp_path / "x.png"))[0, 0]
    assert (r < 5, g > 250, b < 5) == (True, True, True)


@pytest.mark.parametrize("profile", [b"", b"nonsense"])
def test_a_broken_profile_is_ignored(cat, tmp_path, profile):
    cat.save(tmp_path / "x.png", icc_profile=profile)
    assert difference(open_photo(tmp_path / "x.png"), cat) == 0


def test_a_broken_exif_block_is_ignored(cat, tmp_path):
    cat.save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage", quality=95)
    assert difference(open_photo(tmp_path / "x.jpg"), cat) < 3


@pytest.mark.parametrize("kind", ["text", "compressed text", "damaged text", "EXIF"])
def test_a_whole_png_with_odd_chunks_is_read(cat, tmp_path, kind):
    """Pillow refuses texts of more than a megabyte and chunks whose checksum is wrong."""
    info = PngInfo()
    if kind != "EXIF":
        info.add_text("comment", "x" * 2_000_000, zip=kind == "compressed text")
    exif = {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage"} if kind == "EXIF" else {}
    cat.save(tmp_path / "x.png", pnginfo=info, **exif)
    if kind == "damaged text":
        content = (tmp_path / "x.png").read_bytes()
        (tmp_path / "x.png").write_bytes(content.replace(b"comment\0xx", b"comment\0yx"))
    assert difference(open_photo(tmp_path / "x.png"), cat) == 0


def test_large_texts_cost_neither_orientation_nor_transparency(cat, tmp_path):
    info, exif = PngInfo(), Image.Exif()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    exif[0x0112] = 6
    stored = cat.transpose(Image.Transpose.ROTATE_90).convert("P")
    stored.save(tmp_path / "x.png", exif=exif, pnginfo=info, transparency=bytes(256))
    opened = open_photo(tmp_path / "x.png")
    assert opened.size == cat.size
    assert opened.getextrema() == ((255, 255),) * 3  # all is transparent, so white


@pytest.mark.parametrize("largest", [200, 1000, 100_000, 2**31 - 1, 2**32 - 1])
def test_a_32_bit_grey_keeps_its_picture(cat, tmp_path, largest):
    """Unsigned numbers, too, and of any range: the brightest pixel is at least half as bright as white."""
    grey = np.asarray(cat.convert("L"), dtype=np.float64) / 255
    grey /= grey.max()
    tiff = Image.frombytes("I", cat.size, (grey * largest).astype(np.uint32).tobytes())
    tiff.save(tmp_path / "x.tiff")
    opened = np.asarray(open_photo(tmp_path / "x.tiff"), dtype=float)[..., 0]
    assert opened.max() > 127
    assert np.corrcoef(opened.ravel(), grey.ravel())[0, 1] > 0.98


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_a_pipe_among_the_photos_is_refused_and_not_opened(cat, tmp_path):
    cat.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert error_of(tmp_path) == f"{tmp_path}/b.png: a named pipe; expected files and folders alone. Move it away"
    with pytest.raises(UserError, match=r"b\.png: a named pipe; expected a file"):
        open_photo(tmp_path / "b.png")


def test_a_folder_in_order_of_names_with_junk_named_and_skipped(cat, tmp_path):
    for name in ["b.JPG", "a.png", "c"]:  # the last one has no suffix
        cat.save(tmp_path / name, format="PNG")
    (tmp_path / "more").mkdir()
    for name in ["Thumbs.db", ".DS_Store", "._a.png", "a.txt", "empty"]:
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"junk")
    found = find_photos(tmp_path)
    assert [photo.name for photo in found.photos] == ["a.png", "b.JPG", "c"]
    assert dict(found.skipped) == {
        "Thumbs.db": "not an image",
        ".DS_Store": "hidden",
        "._a.png": "hidden",
        "a.txt": "not an image",
        "empty": "not an image",
        "more": "a folder",
    }
    assert difference(found.photos[0].open(), cat) == 0


def test_damaged_photos_are_all_named_with_the_reason(cat, tmp_path):
    whole = io.BytesIO()
    cat.save(whole, format="JPEG")
    damaged = {
        "cut.jpg": (whole.getvalue()[:-500], "a damaged image: image file is truncated"),
        "zero.png": (b"", "the file is empty"),
        "page.jpg": (b"<!DOCTYPE html><html>not found</html>", "not an image but a web page"),
        "noise.webp": (b"no image at all", "not an image in JPEG, PNG"),
        "phone.HEIC": (HEIC_START, "a photo in HEIC format, which cannot be read; export it as JPEG"),
        "phone.jpg": (HEIC_START, "a photo in HEIC or AVIF format, which cannot be read"),
        "camera.NEF": (b"II*\0 raw", "a photo in NEF format, which cannot be read"),
    }
    cat.save(tmp_path / "good.png")
    for name, (content, _) in damaged.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    lines = error_of(tmp_path).splitlines()
    assert len(lines) == len(damaged) + 1
    for name, (_, reason) in damaged.items():
        assert any(line.startswith(f"{tmp_path / name}: {reason}") for line in lines), (name, lines)
    assert f"{tmp_path / 'gone.jpg'}: a link to a file that is not there" in lines


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_photo_is_never_taken_for_whole(cat, tmp_path, kind, share):
    whole = io.BytesIO()
    cat.save(whole, format=kind)
    (tmp_path / f"x.{kind}").write_bytes(whole.getvalue()[: int(share * whole.tell())])
    assert "x." in error_of(tmp_path)


def test_too_many_pixels(cat, tmp_path, monkeypatch):
    cat.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert error_of(tmp_path) == f"{tmp_path / 'x.png'}: more than 10,000 pixels; make it smaller"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)  # Pillow only warns here
    assert len(find_photos(tmp_path).photos) == 1


def test_no_folder_no_photos_no_such_subject(cat, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    expected = "xpected a folder with 3 to 6 photos"
    assert error_of(tmp_path / "photo") == f"{tmp_path}/photo: no such folder. Did you mean 'photos'? E{expected}"
    assert error_of(photos) == f"{photos}: no photos in this folder; e{expected}. It holds: nothing"
    (photos / "dog").mkdir()
    assert error_of(photos).endswith("It holds: dog (a folder)")
    cat.save(tmp_path / "cat.png")
    assert error_of(tmp_path / "cat.png") == f"{tmp_path}/cat.png: a file, not a folder. E{expected}"
    with pytest.raises(UserError, match=r"no built-in subject 'builtin:robto'. Did you mean 'robot'\?"):
        find_photos("builtin:robto")


def test_built_in_photos():
    found = find_photos("builtin:robot")
    assert found.folder == "builtin:robot"
    assert [photo.name for photo in found.photos] == [f"robot-{i}" for i in range(1, 6)]
    images = [photo.open() for photo in found.photos]
    assert all(image.size == (64, 64) and image.mode == "RGB" for image in images)
    again = [photo.open() for photo in find_photos("builtin:robot").photos]
    assert all(difference(a, b) == 0 for a, b in zip(images, again, strict=True))
    assert min(difference(a, b) for i, a in enumerate(images) for b in images[:i]) > 20


def test_opening_twice_gives_separate_images():
    photo = find_photos("builtin:robot").photos[0]
    photo.open().paste((0, 0, 0), (0, 0, 128, 128))
    assert photo.open().getextrema() != ((0, 0), (0, 0), (0, 0))


def test_resizing_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    levels = np.asarray(resize(stripes, (32, 32)))
    assert (np.abs(levels.astype(int) - 128) < 3)[:, 1:-1].all()


@pytest.mark.parametrize(("position", "box"), [((0, 0), (0, 0)), ((0.5, 0.5), (25, 0)), ((1, 1), (50, 0))])
def test_crop_positions(cat, position, box):
    expected = cat.crop((*box, box[0] + 100, box[1] + 100))
    assert difference(Frame.at(cat.size, (100, 100), position).cut(cat), expected) == 0


def test_a_crop_that_does_not_fit_is_refused(cat):
    with pytest.raises(ValueError, match="does not fit"):
        Frame.at(cat.size, (101, 101))


def test_pixels_are_in_plus_minus_one(cat):
    pixels = to_pixels(cat)
    assert pixels.shape == (3, 100, 150)
    assert pixels.dtype == torch.float32
    assert to_pixels(Image.new("RGB", (1, 1), "black")).eq(-1).all()
    assert to_pixels(Image.new("RGB", (1, 1), "white")).eq(1).all()
    levels = ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, np.asarray(cat))


@pytest.mark.skipif(not SUBJECTS.is_dir(), reason=f"no DreamBooth photos at {SUBJECTS}")
def test_the_dreambooth_subjects():
    for folder in sorted(entry for entry in SUBJECTS.iterdir() if entry.is_dir()):
        found = find_photos(folder)
        assert 4 <= len(found.photos) <= 6
        assert found.skipped == ()
        image = found.photos[0].open()
        assert image.mode == "RGB"
        assert min(image.size) >= 600

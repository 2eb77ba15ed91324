"""Conditions: recognised, refused with reasons, and never mixed where colours stand for classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from ether_diffusion.data.conditions import Condition, off_palette, paint, read_condition, to_hint
from ether_diffusion.data.frames import Frame, Size, scaled_size
from ether_diffusion.data.palettes import ADE20K
from ether_diffusion.errors import UserError

GENERATOR = np.random.default_rng(5)
PATCHES = GENERATOR.integers(0, 151, (9, 13))
LABELS = np.kron(PATCHES, np.ones((11, 8), int))  # (99, 104), patches of many classes
SMALL = np.array([[0, 0, 0], [254, 1, 0], [3, 2, 255]], np.uint8)


def save(tmp_path: Path, image: Image.Image, name: str = "map.png") -> Path:
    image.save(tmp_path / name)
    return tmp_path / name


def hint_tensor(condition: Condition, size: Size) -> torch.Tensor:
    """Scaled to cover the size, and cropped in the centre."""
    scaled = scaled_size(condition.image.size, size)
    return to_hint(Frame.at(scaled, size).cut(condition.resized(scaled)))


def error_of(source: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read_condition(source, **options)  # pyright: ignore
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_one_channel_is_a_label_map(tmp_path: Path, dtype: type):
    path = save(tmp_path, Image.fromarray(LABELS.astype(dtype)), "map.tif" if dtype is np.int32 else "map.png")
    for source in (path, str(path), Image.open(path)):
        condition = read_condition(source)
        assert condition.taken_for == "a label map of 150 classes"
        assert condition.discrete
        assert np.array_equal(np.asarray(condition.image), ADE20K[LABELS])


def test_a_painted_map(tmp_path: Path):
    painted = paint(LABELS, ADE20K)
    for image in (painted, painted.convert("RGBA")):
        condition = read_condition(save(tmp_path, image))
        assert condition.taken_for == "a map painted with ADE20K's palette"
        assert condition.discrete
        assert condition.image.tobytes() == painted.tobytes()


def test_another_palette(tmp_path: Path):
    path = save(tmp_path, paint(LABELS % 3, SMALL))
    assert read_condition(path, palette=SMALL).taken_for == "a map painted with the palette of 2 classes"
    assert "not in ADE20K's palette" in error_of(path)
    assert "label 7 at x=1 y=0, 50.0% of the pixels" in error_of(
        Image.fromarray(np.array([[1, 7]], np.uint8)), palette=SMALL
    )


def test_files_with_a_colour_table_are_label_maps_by_their_indices(tmp_path: Path):
    image = Image.fromarray(LABELS.astype(np.uint8)).convert("P")
    for table in ([k for k in range(256) for _ in range(3)], GENERATOR.integers(0, 256, 768).tolist()):
        image.putpalette(table)
        condition = read_condition(save(tmp_path, image))
        assert np.array_equal(np.asarray(condition.image), ADE20K[LABELS])


def test_a_painted_map_that_was_compressed_with_a_colour_table_keeps_its_colours(tmp_path: Path):
    painted = paint(LABELS, ADE20K)
    path = save(tmp_path, painted.quantize(256, dither=Image.Dither.NONE))
    with Image.open(path) as stored:
        assert stored.mode == "P"
        assert not np.array_equal(np.asarray(stored), LABELS)
    condition = read_condition(path)
    assert condition.taken_for == "a map painted with ADE20K's palette"
    assert condition.image.tobytes() == painted.tobytes()


def test_images_that_are_no_maps_are_refused_with_the_reason(tmp_path: Path):
    cat = Image.fromarray(skimage.data.chelsea()).resize((60, 40))
    ways = "name a preprocessor to compute a condition from a photo (canny, ...; none uses the image as it is)"
    message = error_of(save(tmp_path, cat))
    assert message.startswith(f"{tmp_path}/map.png: colour (")
    assert "of the pixels not in ADE20K's palette; " in message
    assert message.endswith(ways)
    assert "a JPEG, which cannot be a label map; expected PNG" in error_of(save(tmp_path, cat, "cat.jpg"))
    # A JPEG under another name is recognised by its content.
    (tmp_path / "map.png").write_bytes((tmp_path / "cat.jpg").read_bytes())
    assert "a JPEG, which cannot be a label map" in error_of(tmp_path / "map.png")
    labels = Image.fromarray(np.array([[3, 3], [255, 151]], np.uint8))
    assert "label 255 at x=0 y=1, 50.0% of the pixels out of range; expected 0 (unlabelled) to 150" in error_of(labels)
    ignored = Image.fromarray(np.array([[3, 255]], np.uint8))
    assert "expected 0 (unlabelled, not 255) to 150" in error_of(ignored)
    assert "(grey in three channels: labels belong in one)" in error_of(
        Image.fromarray(LABELS.astype(np.uint8)).convert("RGB")
    )
    see_through = paint(LABELS, ADE20K)
    see_through.putalpha(9)
    assert "a map with transparency" in error_of(see_through)
    assert error_of(tmp_path / "absent.png") == f"{tmp_path}/absent.png: no such file"
    (tmp_path / "text.png").write_text("no image")
    assert "text.png: not an image in JPEG, PNG" in error_of(tmp_path / "text.png")


def test_an_image_as_it_is(tmp_path: Path):
    cat = Image.fromarray(skimage.data.chelsea()).resize((60, 40))
    condition = read_condition(save(tmp_path, cat), preprocessor="none")
    assert (condition.taken_for, condition.discrete) == ("an image, as it is", False)
    assert condition.image.tobytes() == cat.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (96, 64), (37, 150)])
def test_every_pixel_of_a_hint_is_a_palette_colour(size: tuple[int, int]):
    hint = hint_tensor(read_condition(Image.fromarray(LABELS.astype(np.uint8))), size)
    assert hint.shape == (3, size[1], size[0])
    assert hint.dtype == torch.float32
    levels = (hint * 255).round().byte().permute(1, 2, 0).numpy()
    assert torch.equal(torch.from_numpy(levels).permute(2, 0, 1).float() / 255, hint)
    assert not off_palette(levels, ADE20K).any()


def test_the_check_of_colours_would_see_labels_that_were_interpolated():
    """What the law above is worth: interpolated colours, and colours of interpolated labels, are found out."""
    painted = paint(LABELS, ADE20K)
    mixed = np.asarray(painted.resize((64, 61), Image.Resampling.BILINEAR))
    assert off_palette(mixed, ADE20K).mean() > 0.1
    grey = Image.fromarray(LABELS.astype(np.uint8))
    wrong = paint(np.asarray(grey.resize((64, 61), Image.Resampling.BILINEAR)), ADE20K)
    right = read_condition(grey).resized((64, 61))
    assert (np.asarray(wrong) != np.asarray(right)).any(-1).mean() > 0.1


@pytest.mark.parametrize("size", [(52, 50), (64, 61), (208, 198), (333, 317)])
def test_nearest_neighbours_are_those_of_pixel_centres_as_torch_has_them(size: tuple[int, int]):
    hint = read_condition(Image.fromarray(LABELS.astype(np.uint8))).resized(size)
    labels = torch.from_numpy(LABELS)[None, None].float()
    nearest = torch.nn.functional.interpolate(labels, size=(size[1], size[0]), mode="nearest-exact")[0, 0].long()
    same = (np.asarray(hint) == ADE20K[nearest.numpy()]).all(-1)
    assert same.mean() > 0.999  # a centre that lies between two pixels is rounded either way


def test_photos_are_resampled_smoothly():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 50).astype(np.uint8), (50, 1))).convert("RGB")
    hint = hint_tensor(Condition(ramp, "", discrete=False), (100, 100))
    steps = hint[0, 50, 1:] - hint[0, 50, :-1]
    assert steps.max() < 4.5 / 255  # nearest neighbour would go by steps of 5
    assert 0 <= hint.min() <= hint.max() <= 1


def test_palettes_are_looked_up_exactly():
    pixels = np.array([[[120, 120, 120], [120, 120, 121], [0, 0, 0], [255, 255, 255]]], np.uint8)
    assert off_palette(pixels, ADE20K).tolist() == [[False, True, False, True]]

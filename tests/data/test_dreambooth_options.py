"""DreamBooth samples with captions, masks, buckets, several subjects, fixed crops; and keys of their pixels."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from ether_diffusion.data.photo_dataset import DreamBoothDataset, Part, PixelsKey
from ether_diffusion.data.photos import Photo, PhotoFolder, find_photos, to_pixels
from ether_diffusion.data.subjects import Subject
from ether_diffusion.errors import UserError
from ether_diffusion.randomness import generator, permutation


def folder_of(folder: str, **sizes: tuple[int, int]) -> PhotoFolder:
    whole = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")]
    photos = [Photo(name, whole[i % 3].resize(size)) for i, (name, size) in enumerate(sizes.items())]
    return PhotoFolder(folder, tuple(photos))


DOG = folder_of("dog", wide=(120, 80), tall=(80, 118), square=(90, 90), wider=(150, 75), wide2=(121, 80))
CAT = folder_of("cat", one=(70, 100), two=(100, 70))
DOGS = folder_of("dogs", d1=(64, 64), d2=(100, 80))
CATS = folder_of("cats", c1=(64, 70), c2=(66, 64), c3=(90, 60))
BOTH = [Subject(DOG, "a qwe dog", DOGS, "a dog"), Subject(CAT, "a zwx cat", CATS, "a cat")]


def test_samples_without_options_are_pinned():
    """Against the random numbers written out: one permutation per epoch, then x, y and the coin from one stream."""
    data = DreamBoothDataset([Subject(DOG, "p", CATS, "c")], resolution=48, horizontal_flip=True, seed=5)
    for index in range(23):
        sample = data[index]
        for stream, folder, key in (("instance", DOG, "pixel_values"), ("class", CATS, "class_pixel_values")):
            n = len(folder.photos)
            image = folder.photos[permutation(5, stream, index // n, n)[index % n]].open()
            scale = 48 / min(image.size)
            width, height = (max(48, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            x, y, coin = torch.rand(3, generator=generator(5, f"{stream}/crop", index)).tolist()
            left, top = round(x * (width - 48)), round(y * (height - 48))
            image = image.crop((left, top, left + 48, top + 48))
            assert torch.equal(sample[key], to_pixels(ImageOps.mirror(image) if coin < 0.5 else image))
        assert set(sample) == {"index", "prompt", "class_prompt", "pixel_values", "class_pixel_values"}


def test_captions_follow_their_photos():
    subject = Subject(DOG, "a qwe dog", captions={"tall": "a tall qwe dog"})
    data = DreamBoothDataset([subject], resolution=48)
    for index in range(10):
        tall = data.key(index).photo == "tall"
        assert data[index]["prompt"] == ("a tall qwe dog" if tall else "a qwe dog")


def test_caption_dropout_changes_prompts_alone():
    plain = DreamBoothDataset([Subject(DOG, "p")], resolution=32)
    dropped = DreamBoothDataset([Subject(DOG, "p")], resolution=32, caption_dropout=0.3)
    empty = [index for index in range(300) if dropped.without_pixels(index)["prompt"] == ""]
    assert 60 < len(empty) < 120
    again = DreamBoothDataset([Subject(DOG, "p")], resolution=32, caption_dropout=0.3)
    assert empty == [index for index in reversed(range(300)) if not again.without_pixels(index)["prompt"]][::-1]
    assert all(torch.equal(plain[i]["pixel_values"], dropped[i]["pixel_values"]) for i in range(10))
    assert DreamBoothDataset(BOTH, resolution=32, caption_dropout=1)[0]["class_prompt"] in ("a dog", "a cat")


@pytest.mark.parametrize("crop", ["random", "center", "bucket"])
def test_weights_lie_where_the_photo_lies(crop):
    """The mask is the photo's own grey, so that its weights must equal the pixels, crop by crop."""
    grey = PhotoFolder("g", tuple(Photo(p.name, p.open().convert("L").convert("RGB")) for p in DOG.photos))
    masks = {photo.name: photo.open().convert("L") for photo in grey.photos}
    data = DreamBoothDataset(
        [Subject(grey, "p", masks=masks)], resolution=48, crop=crop, bucket_factor=16, horizontal_flip=True
    )
    for index in range(20):
        sample = data[index]
        assert sample["loss_weights"].shape == (1, *sample["pixel_values"].shape[1:])
        assert torch.allclose(sample["loss_weights"], (sample["pixel_values"][:1] + 1) / 2, atol=1e-6)


def test_smaller_masks_are_scaled_to_their_photo():
    mask = Image.new("L", (12, 8), 0)
    mask.paste(255, (0, 0, 6, 8))
    data = DreamBoothDataset(
        [Subject(folder_of("x", a=(120, 80)), "p", masks={"a": mask})], resolution=64, crop="center"
    )
    weights = data[0]["loss_weights"]
    assert weights.shape == (1, 64, 64)
    assert weights[..., :27].eq(1).all()
    assert weights[..., 37:].eq(0).all()


def test_subjects_without_masks_count_in_full():
    masks = {photo.name: Image.new("L", photo.size, 51) for photo in DOG.photos}
    data = DreamBoothDataset([replace(BOTH[0], masks=masks), BOTH[1]], resolution=32)
    weights = {data.without_pixels(i)["prompt"]: data.without_pixels(i)["loss_weights"] for i in range(4)}
    assert torch.allclose(weights["a qwe dog"], torch.full((1, 32, 32), 0.2))
    assert torch.equal(weights["a zwx cat"], torch.ones(1, 32, 32))


def test_buckets_give_batches_of_one_shape_to_any_division_of_a_step():
    data = DreamBoothDataset(BOTH, resolution=48, crop="bucket", bucket_factor=16, group=4)
    assert data.sizes == {(64, 32): 4, (32, 64): 2, (48, 48): 1}
    shapes = set()
    for size in (1, 2, 4):
        loader = DataLoader(data, batch_size=size, sampler=range(40))
        for batch in loader:  # the default collation stacks, and fails on mixed shapes
            assert batch["pixel_values"].shape == batch["class_pixel_values"].shape
            shapes.add((batch["pixel_values"].shape[3], batch["pixel_values"].shape[2]))
    assert shapes == set(data.sizes)


def test_buckets_lose_little_of_a_photo():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 256).astype(np.uint8), (128, 1)))
    photos = PhotoFolder("x", (Photo("ramp", ramp),))
    whole = DreamBoothDataset([Subject(photos, "p")], resolution=64, crop="bucket", bucket_factor=8)[0]["pixel_values"]
    square = DreamBoothDataset([Subject(photos, "p")], resolution=64, crop="center")[0]["pixel_values"]
    assert whole.shape == (3, 40, 88)
    assert float(whole.max() - whole.min()) > 1.9
    assert float(square.max() - square.min()) < 1.1


def test_class_images_belong_to_the_subject():
    data = DreamBoothDataset(BOTH, resolution=32, seed=2)
    assert len(data) == 10
    seen: dict[str, list[str]] = {"a qwe dog": [], "a zwx cat": []}
    for index in range(24):
        labels = data.without_pixels(index)
        assert labels["class_prompt"] == {"a qwe dog": "a dog", "a zwx cat": "a cat"}[labels["prompt"]]
        assert data.key(index).photo in {p.name for p in (DOG if "dog" in labels["prompt"] else CAT).photos}
        seen[labels["prompt"]].append(data.key(index, "class").photo)
    assert all(sorted(seen["a qwe dog"][i : i + 2]) == ["d1", "d2"] for i in range(0, 12, 2))
    assert all(sorted(seen["a zwx cat"][i : i + 3]) == ["c1", "c2", "c3"] for i in range(0, 12, 3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crop": "center"},
        {"crop": "bucket", "bucket_factor": 16, "group": 2},
        {"crops_per_photo": 2},
    ],
)
def test_equal_keys_mean_equal_pixels_and_other_keys_others(settings):
    data = DreamBoothDataset(BOTH, resolution=48, horizontal_flip=True, **settings)
    by_key, contents = {}, set()
    for index in range(60):
        sample = data[index]
        parts: tuple[tuple[Part, str], ...] = (("instance", "pixel_values"), ("class", "class_pixel_values"))
        for part, name in parts:
            key = data.key(index, part)
            assert PixelsKey(*json.loads(json.dumps(key))) == key
            assert torch.equal(data.pixels(index, part), sample[name])
            assert torch.equal(by_key.setdefault(key, sample[name]), sample[name])
            contents.add((key.photo, sample[name].numpy().tobytes()))
        assert data.without_pixels(index).keys() == sample.keys() - {"pixel_values", "class_pixel_values"}
    assert len(contents) == len(by_key)


def test_fixed_places_have_few_keys():
    def keys(**settings) -> set[PixelsKey]:
        data = DreamBoothDataset([Subject(DOG, "p")], resolution=48, **settings)
        return {data.key(index) for index in range(200)}

    assert len(keys(crop="center")) == 5
    assert len(keys(crop="center", horizontal_flip=True)) == 10
    assert len(keys(crop="bucket", bucket_factor=16)) == 5
    assert len(keys()) > 40
    fixed = keys(crops_per_photo=3)
    assert len([key for key in fixed if key.photo == "wider"]) == 3
    assert len(fixed) <= 15
    assert fixed <= keys(crops_per_photo=6)  # more crops: the first ones stay
    assert fixed != keys(crops_per_photo=3, seed=1)


def test_digests_are_of_contents(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / name)
    data = DreamBoothDataset([Subject(find_photos(tmp_path), "p")], resolution=32)
    digests = {data.key(index).photo: data.key(index).digest for index in range(3)}
    assert digests["a.png"] == digests["b.png"] != digests["c.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crops_per_photo": 2, "crop": "center"}, "crops_per_photo: 2 needs crop=random, got crop=center"),
        ({"crops_per_photo": 0}, "crops_per_photo: 0, expected at least 1, or null"),
        ({"caption_dropout": 1.5}, "caption_dropout: 1.5, expected a probability, 0 to 1"),
        ({"crop": "none"}, "crop: 'none', expected random, center or bucket"),
        ({"crop": "bucket", "bucket_factor": 64}, "bucket_factor: 64, expected 1 to the resolution, 32"),
        ({"group": 0}, "group: 0, expected at least 1"),
    ],
)
def test_options_out_of_range(settings, message):
    with pytest.raises(UserError) as caught:
        DreamBoothDataset(BOTH, resolution=32, **settings)
    assert str(caught.value) == message


def test_subjects_that_do_not_go_together():
    with pytest.raises(UserError, match="either all have class images or none; without: cat"):
        DreamBoothDataset([BOTH[0], Subject(CAT, "a zwx cat")], resolution=32)
    with pytest.raises(UserError, match="expected at least one"):
        DreamBoothDataset([], resolution=32)

"""Samples of image, hint and prompt: cropped alike, functions of their index, each pair once per epoch."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ether_diffusion.data.conditions import Condition, off_palette
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pairs import Pair, Pairs, find_pairs
from ether_diffusion.errors import UserError

PALETTE = np.array([[0, 0, 0], [230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]], np.uint8)


def levels(hint: torch.Tensor) -> np.ndarray:
    return (hint * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Images that are painted from their own maps, of several shapes, as large regions without symmetry."""
    folder = tmp_path_factory.mktemp("painted")
    generator = np.random.default_rng(3)
    pairs = []
    for k, (height, width) in enumerate([(150, 201), (233, 150), (171, 171), (90, 140)]):
        y, x = np.mgrid[:height, :width]
        seeds = generator.uniform(0, 1, (9, 2)) * (height, width)
        nearest = ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(-1)
        labels = (nearest % 5).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{k}-map.png")
        Image.fromarray(PALETTE[labels]).save(folder / f"{k}.png")
        pairs.append(Pair(str(k), folder / f"{k}.png", folder / f"{k}-map.png", f"caption {k}"))
    return Pairs(str(folder), "training", tuple(pairs), "labels", PALETTE)


def apart(sample: dict, shift: int = 0) -> float:
    """The mean difference of image and hint, both in [0, 1], with the hint moved to the right."""
    image, hint = (sample["pixel_values"] + 1) / 2, sample["hint"]
    return (image[:, :, 4:-4] - hint.roll(shift, -1)[:, :, 4:-4]).abs().mean().item()


@pytest.mark.parametrize("resolution", [64, 100, 224])
def test_image_and_hint_stay_aligned_under_every_crop(painted: Pairs, resolution: int):
    data = ControllableDataset(painted, resolution=resolution, crop="random", horizontal_flip=True, seed=7)
    for index in range(24):
        sample = data[index]
        assert apart(sample) < 0.02  # edges alone, where bicubic mixes colours and nearest neighbour does not
        for shift in (-2, 2):
            assert apart(sample, shift) > 1.5 * apart(sample)
        assert (sample["hint"] - sample["hint"].flip(-1)).abs().mean() > 0.05  # a mirrored one would be noticed


@pytest.mark.parametrize("resolution", [48, 64, 129])
def test_every_pixel_of_every_hint_is_a_palette_colour(painted: Pairs, scenes: Path, resolution: int):
    for pairs in (painted, find_pairs(scenes)):
        assert pairs.palette is not None
        data = ControllableDataset(pairs, resolution=resolution, crop="random", horizontal_flip=True)
        for index in range(2 * len(data)):
            assert not off_palette(levels(data[index]["hint"]), pairs.palette).any()


def test_the_law_of_colours_fails_where_maps_are_interpolated(painted: Pairs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Condition, "resized", lambda self, size: self.image.resize(size, Image.Resampling.BILINEAR))
    assert off_palette(levels(ControllableDataset(painted, resolution=64)[0]["hint"]), PALETTE).any()


def test_a_sample_and_an_example(painted: Pairs):
    data = ControllableDataset(painted, resolution=64)
    sample = data[5]
    assert set(sample) == {"index", "name", "prompt", "pixel_values", "hint"}
    assert sample["index"] == 5
    assert sample["prompt"] == f"caption {sample['name']}"
    for key, low in (("pixel_values", -1), ("hint", 0)):
        assert sample[key].shape == (3, 64, 64)
        assert sample[key].dtype == torch.float32
        assert low <= sample[key].min() < sample[key].max() <= 1
    example = data.example(2)
    assert (example["index"], example["name"], example["prompt"]) == (2, "2", "caption 2")
    assert np.array_equal(np.asarray(example["condition"]), levels(example["hint"]))
    assert np.array_equal(np.asarray(example["image"]), levels((example["pixel_values"] + 1) / 2))


def test_examples_are_cropped_in_the_centre_never_mirrored_and_keep_their_caption(painted: Pairs):
    varied = ControllableDataset(painted, resolution=64, crop="random", horizontal_flip=True, caption_dropout=1.0)
    plain = ControllableDataset(painted, resolution=64)
    order = [plain[i]["name"] for i in range(4)]
    for k in range(4):
        assert torch.equal(varied.example(k)["hint"], plain[order.index(str(k))]["hint"])
        assert varied.example(k)["prompt"] == f"caption {k}"


def test_the_centre_of_a_map_is_that_of_the_protocol(painted: Pairs):
    """Short side to the resolution, nearest neighbour, the middle of the long side: computed on labels, by torch."""
    example = ControllableDataset(painted, resolution=75).example(0)
    assert painted.pairs[0].condition is not None
    labels = torch.from_numpy(np.array(Image.open(painted.pairs[0].condition)))[None, None].float()
    assert labels.shape[-2:] == (150, 201)
    scaled = torch.nn.functional.interpolate(labels, size=(75, 100), mode="nearest-exact")[0, 0].long()
    assert np.array_equal(np.asarray(example["condition"]), PALETTE[scaled[:, 12:87].numpy()])


def test_every_pair_once_per_epoch_in_orders_of_their_own(scenes: Path):
    data = ControllableDataset(find_pairs(scenes), resolution=64)
    orders = [tuple(data[6 * epoch + i]["name"] for i in range(6)) for epoch in range(5)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(pair.name for pair in data.pairs.pairs))}
    assert len(set(orders)) > 1


def test_condition_and_caption_follow_the_image_whatever_the_batches(painted: Pairs):
    """A function of seed and index: the same through workers, batches, other orders, copies and a pickle."""
    settings = {"resolution": 64, "crop": "random", "horizontal_flip": True, "caption_dropout": 0.5, "seed": 3}
    data = ControllableDataset(painted, **settings)
    alone = {index: data[index] for index in range(12)}
    order = [7, 0, 11, 3, 5, 1, 2, 10, 9, 4, 8, 6]
    for other in (ControllableDataset(painted, **settings), pickle.loads(pickle.dumps(data))):
        for size, workers in ((5, 0), (4, 2)):
            for batch in DataLoader(other, batch_size=size, sampler=order, num_workers=workers):
                for k, index in enumerate(batch["index"].tolist()):
                    for key in ("pixel_values", "hint"):
                        assert torch.equal(batch[key][k], alone[index][key])
                    assert (batch["name"][k], batch["prompt"][k]) == (alone[index]["name"], alone[index]["prompt"])
    other_seed = ControllableDataset(painted, **{**settings, "seed": 4})
    assert not all(torch.equal(other_seed[i]["hint"], alone[i]["hint"]) for i in range(12))


def test_captions_are_dropped_as_often_as_asked_and_hints_stay(scenes: Path):
    data = ControllableDataset(find_pairs(scenes), resolution=16, caption_dropout=0.3)
    kept = ControllableDataset(find_pairs(scenes), resolution=16)
    empty = 0
    for index in range(300):
        sample = data[index]
        empty += sample["prompt"] == ""
        assert sample["prompt"] in ("", kept[index]["prompt"])
        assert torch.equal(sample["hint"], kept[index]["hint"])
    assert 60 < empty < 120


def test_half_of_the_samples_are_mirrored_and_random_crops_reach_both_ends(painted: Pairs):
    wide = replace(painted, pairs=painted.pairs[:1])
    plain = ControllableDataset(wide, resolution=150)
    flipped = ControllableDataset(wide, resolution=150, horizontal_flip=True)
    turned = sum(torch.equal(flipped[i]["hint"], plain[i]["hint"].flip(-1)) for i in range(60))
    assert 18 < turned < 42
    whole = np.asarray(Image.open(str(wide.pairs[0].image)))
    random = ControllableDataset(wide, resolution=150, crop="random")
    found = Counter()
    for i in range(40):
        cut = levels(random[i]["hint"])
        (left,) = [x for x in range(52) if np.array_equal(whole[:, x : x + 150], cut)]
        found[left // 17] += 1
    assert set(found) == {0, 1, 2}


def test_a_map_of_another_size_than_its_image(painted: Pairs, tmp_path: Path):
    Image.new("L", (201, 150)).resize((150, 201)).save(tmp_path / "map.png")
    pair = replace(painted.pairs[0], condition=tmp_path / "map.png")
    with pytest.raises(UserError, match=r"map\.png: 150 x 201, but its image .*0\.png is 201 x 150 with its EXIF"):
        ControllableDataset(replace(painted, pairs=(pair,)), resolution=64)[0]


def test_ade20ks_maps_belong_to_the_pixels_as_they_are_stored(ade20k: Path):
    """Its labels were made on the stored pixels, and its own tools ignore the EXIF orientation."""
    path = next((ade20k / "images/training").glob("*_00000001.jpg"))
    before = ControllableDataset(find_pairs(ade20k), resolution=64).example(0)
    exif = Image.Exif()
    exif[274] = 3  # upside down
    with Image.open(path) as image:
        image.save(path, exif=exif, quality=95, subsampling=0)
    after = ControllableDataset(find_pairs(ade20k), resolution=64).example(0)
    assert (before["pixel_values"] - after["pixel_values"]).abs().mean() < 0.02
    assert torch.equal(before["hint"], after["hint"])


def turned(path: Path, orientation: int) -> None:
    """Give a file an EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(path) as image:
        image.save(path, exif=exif, quality=95, subsampling=0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_hint_alone_equals_the_one_with_its_image(tmp_path: Path, orientation: int):
    """Detectors round sides, here 666 x 500 to 704 x 512: the image's own size gives the frame."""
    y, x = np.mgrid[:500, :666]
    pixels = np.stack([(x // 37 % 2) * 255, (y // 29 % 2) * 255, (x + y) % 256], -1).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/a.jpg", quality=95)
    turned(tmp_path / "photos/a.jpg", orientation)
    pairs = find_pairs(tmp_path / "photos", condition="canny", caption_template="a photo", cache_dir=tmp_path / "cache")
    data = ControllableDataset(pairs, resolution=256, horizontal_flip=True)
    assert data[0]["hint"].mean() > 0.01  # there are edges to misplace
    for index in range(4):
        assert torch.equal(data[index]["hint"], data.without_pixels(index)["hint"])


def test_equal_keys_are_equal_pixels_however_a_folder_is_read(ade20k: Path, tmp_path: Path):
    """With ADE20K's label maps the EXIF orientation is ignored, with canny it is applied."""
    for path in (ade20k / "images/training").iterdir():
        turned(path, 3)
    stored = ControllableDataset(find_pairs(ade20k), resolution=64)
    oriented = ControllableDataset(find_pairs(ade20k, condition="canny", cache_dir=tmp_path), resolution=64)
    again = ControllableDataset(find_pairs(ade20k), resolution=64)
    assert stored[0]["name"] == oriented[0]["name"]
    assert not torch.equal(stored[0]["pixel_values"], oriented[0]["pixel_values"])
    assert stored.keys(0) != oriented.keys(0)
    assert stored.keys(0) == again.keys(0)


def test_conditions_without_images_give_examples_and_no_samples(painted: Pairs):
    bare = replace(painted, pairs=tuple(replace(pair, image=None) for pair in painted.pairs))
    data = ControllableDataset(bare, resolution=64)
    whole = ControllableDataset(painted, resolution=64)
    assert "image" not in data.example(1)
    assert torch.equal(data.example(1)["hint"], whole.example(1)["hint"])
    with pytest.raises(UserError, match="a condition without an image, which cannot be trained on"):
        data[0]


def test_options_out_of_range(painted: Pairs):
    with pytest.raises(UserError, match=r"caption_dropout: 1\.5, expected a probability"):
        ControllableDataset(painted, resolution=64, caption_dropout=1.5)
    with pytest.raises(UserError, match="crop: 'centre', expected center or random"):
        ControllableDataset(painted, resolution=64, crop="centre")  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match="numbered from 0, got -1"):
        ControllableDataset(painted, resolution=64)[-1]

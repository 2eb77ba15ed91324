"""DreamBooth samples: functions of their global index, each photo once per epoch, the photo's own pixels."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ether_diffusion.data.frames import Frame, scaled_size
from ether_diffusion.data.photo_dataset import DreamBoothDataset, dreambooth_prompts
from ether_diffusion.data.photos import Photo, PhotoFolder, find_photos, resize, to_pixels
from ether_diffusion.data.subjects import Subject


def photo_folder(*names: str) -> PhotoFolder:
    """Small photos that differ in content and shape."""
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    sizes = [(120, 80), (80, 90), (64, 64), (70, 100)]
    return PhotoFolder("x", tuple(Photo(n, i.resize(s)) for n, i, s in zip(names, images, sizes, strict=False)))


INSTANCE = photo_folder("astronaut", "chelsea", "coffee")
CLASS = photo_folder("rocket", "coffee", "chelsea", "astronaut")


def dataset(seed: int = 0, class_folder: PhotoFolder | None = None, **settings) -> DreamBoothDataset:
    subject = Subject(INSTANCE, "a photo of qwe cat", class_folder, "a photo of cat")
    return DreamBoothDataset([subject], **{"resolution": 48, "seed": seed, **settings})


def which(pixels: torch.Tensor, folder: PhotoFolder = INSTANCE, resolution: int = 48) -> int:
    """The index of the photo that these centre-cropped pixels show."""
    square, shown = (resolution, resolution), []
    for photo in folder.photos:
        scaled = resize(photo.open(), scaled_size(photo.size, square))
        shown.append(to_pixels(Frame.at(scaled.size, square).cut(scaled)))
    (match,) = [i for i, other in enumerate(shown) if torch.equal(other, pixels)]
    return match


def test_prompts():
    assert dreambooth_prompts("qwe", "dog") == ("a photo of qwe dog", "a photo of dog")


def test_a_sample():
    sample = dataset()[4]
    assert sample["index"] == 4
    assert sample["prompt"] == "a photo of qwe cat"
    assert sample["pixel_values"].shape == (3, 48, 48)
    assert sample["pixel_values"].dtype == torch.float32
    assert -1 <= sample["pixel_values"].min() < sample["pixel_values"].max() <= 1
    assert "class_prompt" not in sample


def test_every_photo_once_per_epoch_in_orders_of_their_own():
    data = dataset(crop="center")
    assert len(data) == 3
    orders = [tuple(which(data[3 * epoch + i]["pixel_values"]) for i in range(3)) for epoch in range(8)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 1


def test_a_sample_depends_on_seed_and_index_alone():
    data = dataset(horizontal_flip=True)
    forwards = [data[i]["pixel_values"] for i in range(9)]
    backwards = [dataset(horizontal_flip=True)[i]["pixel_values"] for i in reversed(range(9))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    other_seed = [dataset(seed=1, horizontal_flip=True)[i]["pixel_values"] for i in range(9)]
    assert not all(torch.equal(a, b) for a, b in zip(forwards, other_seed, strict=True))


def test_random_crops_stay_inside_and_differ():
    wide = PhotoFolder("x", (Photo("ramp", Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))),))
    data = DreamBoothDataset([Subject(wide, "p")], resolution=50)
    lefts = [round((data[i]["pixel_values"][0, 0, 0].item() + 1) * 127.5) for i in range(200)]
    assert 0 <= min(lefts) < 8
    assert 142 < max(lefts) <= 150
    assert abs(np.mean(lefts) - 75) < 12


def test_half_of_the_samples_are_flipped():
    plain, flipped = dataset(crop="center"), dataset(crop="center", horizontal_flip=True)
    turned = 0
    for i in range(200):
        a, b = plain[i]["pixel_values"], flipped[i]["pixel_values"]
        assert torch.equal(a, b) != torch.equal(a.flip(-1), b)
        turned += torch.equal(a.flip(-1), b)
    assert 70 < turned < 130


def test_class_images_have_an_order_of_their_own():
    data = dataset(crop="center", class_folder=CLASS)
    samples = [data[i] for i in range(24)]
    shown = [which(sample["class_pixel_values"], CLASS) for sample in samples]
    assert all(sorted(shown[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 24, 4))
    assert {sample["class_prompt"] for sample in samples} == {"a photo of cat"}
    alone = dataset(crop="center")
    assert all(torch.equal(alone[i]["pixel_values"], sample["pixel_values"]) for i, sample in enumerate(samples))


def test_class_images_need_a_prompt():
    with pytest.raises(ValueError, match="class_prompt"):
        Subject(INSTANCE, "a photo of qwe cat", CLASS)


def test_negative_indices_are_refused():
    with pytest.raises(IndexError):
        dataset()[-1]


def test_photos_are_decoded_once(monkeypatch):
    data = dataset()
    monkeypatch.setattr(Photo, "open", lambda _: pytest.fail("decoded again"))
    assert all("pixel_values" in data[i] for i in range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_and_workers_change_nothing(workers):
    data = dataset(class_folder=CLASS)
    indices = [5, 0, 11, 3]
    loader = DataLoader(data, batch_size=2, sampler=indices, num_workers=workers)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[5, 0], [11, 3]]
    for key in ("pixel_values", "class_pixel_values"):
        loaded = torch.cat([batch[key] for batch in batches])
        assert torch.equal(loaded, torch.stack([data[i][key] for i in indices]))


def test_golden_samples():
    """Pinned: a change here changes what every seed trains on."""
    robot = find_photos("builtin:robot")
    data = DreamBoothDataset([Subject(robot, "p")], resolution=64, horizontal_flip=True, seed=7)
    plain = [to_pixels(photo.open()) for photo in robot.photos]
    shown = []
    for index in range(10):
        pixels = data[index]["pixel_values"]
        shown += [(i, "") for i, photo in enumerate(plain) if torch.equal(photo, pixels)]
        shown += [(i, "flipped") for i, photo in enumerate(plain) if torch.equal(photo.flip(-1), pixels)]
    assert [photo for photo, _ in shown] == GOLDEN_ORDER
    assert [index for index, (_, flip) in enumerate(shown) if flip] == GOLDEN_FLIPS


GOLDEN_ORDER = [1, 4, 3, 0, 2, 4, 0, 3, 2, 1]
GOLDEN_FLIPS = [0, 2, 3, 4, 7]

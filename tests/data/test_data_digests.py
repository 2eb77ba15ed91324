"""Digests of data: the same in any folder; different for any change that a training or a score would see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.benchmark.inputs import BenchmarkData
from ether_diffusion.data.data_digests import pairs_digest, real_images_digest
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.layouts import write_ade20k_splits


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_ade20k_splits(tmp_path / "scenes", {"training": range(3)})


def pairs_of(folder: Path) -> Pairs:
    return find_pairs(folder, caption_template="a {name}")


def another_image(folder: Path) -> None:
    file = sorted((folder / "images/training").iterdir())[0]
    save_png(Image.open(file).rotate(180), file)


def another_map(folder: Path) -> None:
    file = sorted((folder / "annotations/training").iterdir())[0]
    save_png(Image.fromarray(np.asarray(Image.open(file)).clip(max=1)), file)


def another_caption(folder: Path) -> None:
    shutil.rmtree(folder / "captions")


def another_palette(folder: Path) -> None:
    (palette,) = folder.glob("color*.csv")
    head, first, *lines = palette.read_text().splitlines()
    number, _, *rest = first.split(",")
    palette.write_text("\n".join([head, ",".join([number, "77", *rest]), *lines]))


def one_less(folder: Path) -> None:
    for kind in ("images", "annotations"):
        sorted((folder / kind / "training").iterdir())[0].unlink()


CHANGES = (another_image, another_map, another_caption, another_palette, one_less)


@pytest.mark.parametrize("change", CHANGES)
def test_pairs_are_identified_by_content_in_any_folder(dataset: Path, change: Callable[[Path], None]) -> None:
    other = Path(shutil.copytree(dataset, dataset.with_name("copy")))
    cache, before = dataset.with_name("cache"), pairs_digest(pairs_of(dataset))
    assert pairs_digest(pairs_of(other)) == before
    assert pairs_digest(pairs_of(dataset), cache) == before
    assert pairs_digest(pairs_of(dataset), cache) == before
    images = real_images_digest(pairs_of(other))
    change(other)
    after = pairs_digest(pairs_of(other))
    assert after != before
    assert pairs_digest(pairs_of(other), cache) == after
    assert (real_images_digest(pairs_of(other)) == images) is (change not in (another_image, one_less))


def test_files_of_unchanged_size_and_time_are_not_read_again(dataset: Path) -> None:
    cache, image = dataset.with_name("cache"), sorted((dataset / "images/training").iterdir())[0]
    before, times = pairs_digest(pairs_of(dataset), cache), image.stat()
    image.write_bytes(bytes(times.st_size))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert pairs_digest(pairs_of(dataset), cache) == before
    assert pairs_digest(pairs_of(dataset)) != before
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert pairs_digest(pairs_of(dataset), cache) == pairs_digest(pairs_of(dataset))


def test_built_in_maps_are_identified_by_pixels(dataset: Path) -> None:
    """Each machine writes these PNG files itself, with its own zlib."""
    file = sorted((dataset / "annotations/training").iterdir())[0]

    def digests() -> list[str]:
        found = pairs_of(dataset)
        return [pairs_digest(replace(found, folder=folder)) for folder in ("builtin:scenes", str(dataset))]

    before = digests()
    Image.open(file).save(file, compress_level=0)
    assert [one == other for one, other in zip(digests(), before, strict=True)] == [True, False]
    another_map(dataset)
    assert digests()[0] != before[0]


def test_subjects_are_identified_with_their_captions_masks_and_class_images(tmp_path: Path) -> None:
    folder, masks, class_dir = (tmp_path / name for name in ("photos", "masks", "class"))
    for k, place in enumerate((folder, masks, class_dir)):
        save_png(Image.new("L", (8, 8), 100 + k).convert("L" if place == masks else "RGB"), place / "a.png")
    (folder / "a.txt").write_text("one caption")

    def digests() -> dict[str, object]:
        prior = SimpleNamespace(class_dir=class_dir)
        data = SimpleNamespace(instance_dir=str(folder), captions=True, masks=masks, prior=prior)
        return BenchmarkData(tmp_path).of_subject(SimpleNamespace(data=data), find_photos(folder).photos)

    before = digests()
    assert digests() == before
    for key, file in (("masks", masks / "a.png"), ("class_images", class_dir / "a.png"), ("photos", folder / "a.png")):
        save_png(Image.new("L", (8, 8), 200).convert("L" if key == "masks" else "RGB"), file)
        after = digests()
        assert {name for name in after if after[name] != before[name]} == {key}
        before = after
    (folder / "a.txt").write_text("another caption")
    assert {name for name, one in digests().items() if one != before[name]} == {"captions"}

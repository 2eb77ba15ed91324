"""Maps to images under a protocol: the truth is the label map, the whole set is scored, images are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.data.conditions import paint
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.intervals import Bootstrap
from ether_diffusion.evaluation.map_images import find_map_images, find_scenes, read_scene
from ether_diffusion.evaluation.map_scores import score_maps, segmentation_estimates
from ether_diffusion.evaluation.protocols import MapProtocol, load_protocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.metrics import InceptionDistance, SegmentationScore
from ether_diffusion.metrics.segmentation import class_counts
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.layouts import write_ade20k_splits

COUNT = 6


@pytest.fixture(scope="module")
def protocol() -> MapProtocol:
    few = {"images": COUNT, "bootstrap": Bootstrap(replicates=200), "distribution_replicates": 40}
    return load_protocol(MapProtocol, "tinyworld/s2i-v1").model_copy(update=few)


@pytest.fixture(scope="module")
def scorers(protocol: MapProtocol) -> dict[str, Loaded]:
    return load_scorers(protocol.judges)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k_splits(tmp_path_factory.mktemp("scenes") / "ade", {"validation": range(20, 20 + COUNT)})


@pytest.fixture(scope="module")
def pairs(protocol: MapProtocol, dataset: Path) -> Pairs:
    return find_scenes(protocol, dataset)


@pytest.fixture
def images(pairs: Pairs, tmp_path: Path) -> Path:
    """Each scene has the image of the next one: wrong, and known."""
    for pair, other in zip(pairs.pairs, pairs.pairs[1:] + pairs.pairs[:1], strict=True):
        assert other.image is not None
        save_png(Image.open(other.image), tmp_path / "images" / f"{pair.name}.png")
    return tmp_path


def scored(protocol: MapProtocol, pairs: Pairs, folder: Path, scorers: dict[str, Loaded], batch_size: int = 4):
    return score_maps(protocol, pairs, find_map_images(protocol, folder, pairs), scorers, {}, batch_size)


def test_values_are_those_of_the_metrics_over_the_whole_set(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded]
) -> None:
    found = scored(protocol, pairs, images, scorers)
    assert found.run == {"not_told": "settings"}
    assert "generated with settings not recorded" in found.counted()
    scenes = [read_scene(pair, pairs, 64) for pair in pairs.pairs]
    generated = [Image.open(images / "images" / f"{scene.name}.png") for scene in scenes]
    labels, segment = np.stack([scene.labels for scene in scenes]), scorers["segmenter"].network
    own = SegmentationScore(23).update(segment(generated), labels).compute()
    real = SegmentationScore(23).update(segment([scene.image for scene in scenes]), labels).compute()
    assert found.metrics["mIoU"].value == pytest.approx(own["miou"])
    assert found.metrics["accuracy"].value == pytest.approx(own["pixel_accuracy"])
    assert found.ceilings == pytest.approx({"mIoU": real["miou"], "accuracy": real["pixel_accuracy"]})
    assert found.metrics["mIoU"].value < found.ceilings["mIoU"]
    occurring = {k: value for k, value in enumerate(own["iou_per_class"], 1) if value == value}
    by_class = {int(name.split()[0]): value for name, value in found.metrics["mIoU"].per_class.items()}
    assert by_class == pytest.approx(occurring)
    assert found.metrics["mIoU"].absent_classes == own["absent_classes"]
    assert f"mIoU over the {len(by_class)} of 23 classes that occur" in found.counted()
    distance = InceptionDistance(scorers["backbone"].network)
    distance.update([scene.image for scene in scenes], [scene.name for scene in scenes], real=True)
    distance.update(generated, [scene.name for scene in scenes], real=False)
    expected = distance.compute()
    assert found.metrics["FID"].value == pytest.approx(expected["fid"], abs=1e-4)
    assert found.metrics["KID"].value == pytest.approx(expected["kid"], abs=1e-4)
    assert [metric.higher_is_better for metric in found.metrics.values()] == [True, True, False, False]
    for metric in found.metrics.values():
        assert metric.low <= metric.value < metric.high  # equal: the FID of the same images under other names


def test_counts_of_each_image_are_those_of_a_second_segmentation(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded], tmp_path: Path
) -> None:
    (images / "images" / f"{pairs.pairs[2].name}.png").unlink()
    found = Results.read(scored(protocol, pairs, images, scorers).save(tmp_path / "results.json"))
    scenes = [read_scene(pair, pairs, 64) for k, pair in enumerate(pairs.pairs) if k != 2]
    labels = np.stack([scene.labels for scene in scenes])
    again = scorers["segmenter"].network([Image.open(images / "images" / f"{scene.name}.png") for scene in scenes])
    assert list(found.per_image["segmenter"]) == [scene.name for scene in scenes]
    assert torch.equal(found.class_counts("segmenter", 23), class_counts(again, labels, 23))
    first = found.per_image["segmenter"][scenes[0].name]
    assert all(any(pixels) for _, *pixels in first)  # absent classes take no space
    whole = SegmentationScore(23).update(again, labels).compute()
    estimates = segmentation_estimates(found.class_counts("segmenter", 23), protocol.bootstrap)
    assert estimates["miou"].value == whole["miou"] == found.metrics["mIoU"].value
    interval = estimates["miou"].interval(protocol.metrics["mIoU"].bounds)
    assert (interval.low, interval.high) == (found.metrics["mIoU"].low, found.metrics["mIoU"].high)


def test_a_file_has_one_line_an_image_and_older_files_have_no_counts(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded], tmp_path: Path
) -> None:
    found = scored(protocol, pairs, images, scorers)
    path = found.save(tmp_path / "results.json")
    lines = path.read_text().splitlines()
    for pair in pairs.pairs:
        assert [line for line in lines if line.startswith(f'   "{pair.name}": [[')]
    assert Results.read(path) == found
    older = {name: value for name, value in json.loads(path.read_text()).items() if name != "per_image"}
    path.write_text(json.dumps(older))
    assert Results.read(path) == found.model_copy(update={"per_image": {}})
    assert Results.read(path).class_counts("segmenter", 23).shape == (0, 3, 23)


def test_batches_change_no_result_and_faults_are_counted(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded]
) -> None:
    names = [pair.name for pair in pairs.pairs]
    (images / "images" / f"{names[0]}.png").unlink()
    save_png(Image.new("RGB", (64, 64)), images / "images" / f"{names[1]}.png")
    save_png(Image.open(images / "images" / f"{names[2]}.png"), images / "images" / f"{names[3]}.png", {"again": 1})
    first, again = (scored(protocol, pairs, images, scorers, batch_size) for batch_size in (1, COUNT))
    counts = {"subjects": 0, "prompts": 6, "images": 5, "expected": 6, "black": 1, "missing": 1, "duplicate": 1}
    assert first.counts == again.counts == counts
    for name, metric in first.metrics.items():
        assert again.data == first.data
        for field in ("value", "low", "high"):
            assert getattr(again.metrics[name], field) == pytest.approx(getattr(metric, field), abs=1e-4)


def test_other_maps_and_other_captions_are_other_data(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded], dataset: Path, tmp_path: Path
) -> None:
    """Captions are part of the data if images record them; images that are found need none."""
    few = protocol.model_copy(update={"bootstrap": Bootstrap(replicates=2), "distribution_replicates": 2})
    plain = scored(few, pairs, images, scorers).data
    assert set(plain) == {"maps of validation", "images of validation"}

    def data_with(caption: str) -> dict[str, str]:
        rows = [{"file": f"images/{pair.name}.png", "name": pair.name, "prompt": caption} for pair in pairs.pairs]
        (images / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return scored(few, pairs, images, scorers).data

    one, other = data_with("a scene"), data_with("a place")
    assert set(one) == {*plain, "captions of validation"}
    assert {name for name in one if one[name] != other[name]} == {"captions of validation"}
    bare = Path(shutil.copytree(dataset, tmp_path / "bare"))
    shutil.rmtree(bare / "captions")
    with pytest.raises(UserError, match="no captions"):
        find_scenes(few, bare)
    map_file = sorted((bare / "annotations/validation").iterdir())[0]
    save_png(Image.fromarray(np.asarray(Image.open(map_file)).clip(max=1)), map_file)
    without = find_scenes(few, bare, caption_template="{name}")
    found = score_maps(few, without, find_map_images(few, images, without), scorers, {}).data
    assert {name for name in plain if found[name] != plain[name]} == {"maps of validation"}
    real = without.pairs[0].image
    assert real is not None
    save_png(Image.open(real).rotate(180), real)
    found = score_maps(few, without, find_map_images(few, images, without), scorers, {}).data
    assert found["images of validation"] != plain["images of validation"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.png"', r"images\.jsonl:2: expected a JSON object with file as text\."),
        ('{"prompt": "a scene"}', r"images\.jsonl:2: expected a JSON object with file as text\."),
        ('["a.png"]', r"images\.jsonl:2: expected a JSON object with file as text\."),
        ('{"file": "../a.png"}', r"images\.jsonl:2: \.\./a\.png is outside the folder\."),
        (
            '{"file": "a.png", "guidance": 9.0}',
            r"a\.png was generated with guidance 9\.0; tinyworld/s2i-v1 states 3\.0",
        ),
        (
            '{"file": "a.png", "condition_scale": 0.5}',
            r":2: .* generated with condition_scale 0\.5; .* states 1\.0\.",
        ),
    ],
)
def test_lists_that_cannot_be_read_or_record_other_settings_are_refused(
    protocol: MapProtocol, pairs: Pairs, tmp_path: Path, line: str, message: str
) -> None:
    row = {"file": f"{pairs.pairs[0].name}.png", "seed": 0, "steps": 20}
    (tmp_path / "images.jsonl").write_text(f"{json.dumps(row)}\n{line}\n")
    with pytest.raises(UserError, match=message) as refused:
        find_map_images(protocol, tmp_path, pairs)
    assert len(str(refused.value).splitlines()) == 1


def test_the_truth_is_framed_as_the_hint_is(dataset: Path, tmp_path: Path) -> None:
    """On a wide image: the painted hint that a run gets, and the image that it is trained on."""
    pairs = find_pairs(dataset, split="validation", condition="labels", limit=1)
    image, labels = (tmp_path / kind / "validation" for kind in ("images", "annotations"))
    original, numbers = pairs.pairs[0].image, pairs.pairs[0].condition
    assert original is not None
    assert numbers is not None
    save_png(Image.open(original).resize((150, 100)), image / "wide.png")
    save_png(Image.open(numbers).resize((150, 100), Image.Resampling.NEAREST), labels / "wide.png")
    (tmp_path / "color23.csv").write_bytes((dataset / "color23.csv").read_bytes())
    wide = find_pairs(tmp_path, split="validation", condition="labels", caption_template="a scene")
    example, scene = ControllableDataset(wide, resolution=48).example(0), read_scene(wide.pairs[0], wide, 48)
    assert wide.palette is not None
    assert np.array_equal(np.asarray(paint(scene.labels, wide.palette)), np.asarray(example["condition"]))
    assert np.array_equal(np.asarray(scene.image), np.asarray(example["image"]))


def test_images_of_no_scene_and_other_data_sets_are_refused(
    protocol: MapProtocol, pairs: Pairs, images: Path, scorers: dict[str, Loaded], dataset: Path, tmp_path: Path
) -> None:
    save_png(Image.new("RGB", (64, 64), "red"), images / "images" / "ADE_val_0000000.png")  # a part of a scene's name
    with pytest.raises(UserError, match=r"1 images of no scene that the protocol takes from .*: ADE_val_0000000\."):
        find_map_images(protocol, images, pairs)
    (images / "images" / "ADE_val_0000000.png").unlink()
    save_png(Image.new("RGB", (32, 64), "red"), images / "images" / f"{pairs.pairs[0].name}.png")
    with pytest.raises(UserError, match=r"32 x 64; tinyworld/s2i-v1 states 64 x 64"):
        scored(protocol, pairs, images, scorers)
    csail = load_protocol(MapProtocol, "s2i/csail-v1")
    with pytest.raises(UserError, match=r"6 pairs in split 'validation'; s2i/csail-v1 takes 2,000\."):
        find_scenes(csail, dataset)
    with pytest.raises(UserError, match=r"23 classes; s2i/csail-v1 has 150\."):
        find_scenes(csail.model_copy(update={"images": COUNT}), dataset)

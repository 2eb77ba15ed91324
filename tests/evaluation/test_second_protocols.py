"""The metrics of the second protocols: drift, retrieval, shortfall and CMMD, and intervals by the jackknife."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.galleries import gallery_of
from ether_diffusion.evaluation.intervals import Bootstrap
from ether_diffusion.evaluation.map_images import find_map_images, find_scenes, read_scene
from ether_diffusion.evaluation.map_scores import score_maps
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.evaluation.subject_images import AFTER, BEFORE, DRIFT, find_images, recorded_settings
from ether_diffusion.evaluation.subject_scores import score_subject, subject_results
from ether_diffusion.metrics.cmmd import clip_distance
from ether_diffusion.metrics.segmentation import SegmentationScore
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, look_alikes, render_photos
from ether_diffusion.tinyworld.layouts import write_ade20k_splits

ListImages = Callable[[Path, Mapping[str, str]], None]

ELSEWHERE = ("a photo of a {subject}", "a red ball in a room")


@pytest.fixture(scope="module")
def second(protocol: SubjectProtocol) -> SubjectProtocol:
    """The two subjects of `protocol`, with the metrics of the second version and two prompts of drift."""
    whole = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v2").model_dump(mode="json")
    first = protocol.model_dump(mode="json")
    whole |= {key: first[key] for key in ("subjects", "prompts", "sampling")}
    return SubjectProtocol.model_validate(whole | {"name": "tests/second", "drift_prompts": ELSEWHERE})


def results(protocol: SubjectProtocol, images: Path, photos: Path, scorers: dict[str, Loaded]) -> Results:
    found = find_images(protocol, images, photos)
    scored = [score_subject(one, protocol, scorers) for one in found]
    return subject_results(protocol, scored, scorers, recorded_settings(found))


def test_drift_is_one_minus_the_cosine_of_before_and_after(
    second: SubjectProtocol, scorers: dict[str, Loaded], images: Path, photos: Path, list_images: ListImages
) -> None:
    pictures = {BEFORE: (look_alikes("dog", 1)[0], look_alikes("cat", 1)[0]), AFTER: render_photos("robot")[:2]}
    for when, shown in pictures.items():
        for k, image in enumerate(shown):
            save_png(image, images / "dog" / DRIFT / when / f"{k}.png")
        list_images(images / "dog" / DRIFT / when, {f"{k}.png": t for k, t in enumerate(second.drift_texts("dog"))})
    before, after = (scorers["backbone"].network.image_features(list(shown)) for shown in pictures.values())
    expected = (1 - (before * after).sum(dim=1)).tolist()
    found = results(second, images, photos, scorers).metrics["drift"]
    assert not found.higher_is_better
    assert found.per_prompt == pytest.approx(dict(zip(second.drift_texts("dog"), expected, strict=True)), abs=1e-5)
    assert list(found.per_subject) == ["dog"]  # the other has no such images
    assert found.low <= found.value <= found.high


def test_retrieval_ranks_the_subjects_photos_among_those_of_others(
    second: SubjectProtocol, scorers: dict[str, Loaded], images: Path, photos: Path
) -> None:
    found = results(second, images, photos, scorers)
    gallery = gallery_of(second, "dog", photos)
    assert list(gallery) == [f"backpack_dog/{k}.png" for k in range(5)]
    shown = [Image.open(file) for file in sorted((images / "dog").glob("*.png"))]
    one, right = (
        scorers["backbone"].network.image_features(shown),
        scorers["backbone"].network.image_features([Image.open(file) for file in sorted((photos / "dog").iterdir())]),
    )
    wrong = scorers["backbone"].network.image_features(render_photos("monster"))
    places = 1 + ((one @ wrong.T) > (one @ right.T).max(dim=1, keepdim=True).values).sum(dim=1).double()
    assert found.metrics["rank"].per_subject["dog"] == pytest.approx(float(places.mean()))
    assert 0 < found.metrics["retrieval"].value <= 1
    assert found.data["gallery of dog"] != found.data["gallery of backpack_dog"]


def test_the_miniatures_gallery_has_look_alikes_and_photos_find_their_own(
    scorers: dict[str, Loaded], tmp_path: Path
) -> None:
    protocol = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v2")
    gallery = gallery_of(protocol, "party_cat", "builtin:")
    assert len(gallery) == 5 * (len(SUBJECTS) - 1) + 20
    assert sum(name.startswith("look-alike cat/") for name in gallery) == 20
    assert [image.tobytes() for image in look_alikes("cat", 3)] == [
        image.tobytes() for image in look_alikes("cat", 20)[:3]
    ]


def test_metrics_without_their_images_are_left_out(
    second: SubjectProtocol, scorers: dict[str, Loaded], images: Path, photos: Path
) -> None:
    assert "drift" not in results(second, images, photos, scorers).metrics


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drift_prompts": ()}, "expected prompts if, and only if, a metric is of kind drift"),
        ({"drift_prompts": ("a {thing}",)}, "at most one {subject}"),
        ({"drift_prompts": ("a cat", "a cat")}, "no prompt twice"),
    ],
)
def test_prompts_of_drift_are_checked(second: SubjectProtocol, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubjectProtocol.model_validate(second.model_dump(mode="json") | changed)


COUNT = 5


@pytest.fixture(scope="module")
def maps() -> MapProtocol:
    few = {"images": COUNT, "bootstrap": Bootstrap(replicates=100)}
    return load_protocol(MapProtocol, "tinyworld/s2i-v2").model_copy(update=few)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k_splits(tmp_path_factory.mktemp("scenes") / "ade", {"validation": range(20, 20 + COUNT)})


def test_shortfall_is_the_real_images_agreement_minus_the_images(
    maps: MapProtocol, dataset: Path, tmp_path: Path
) -> None:
    pairs, scorers = find_scenes(maps, dataset), load_scorers(maps.judges)
    for pair, other in zip(pairs.pairs, pairs.pairs[1:] + pairs.pairs[:1], strict=True):
        assert other.image is not None
        save_png(Image.open(other.image), tmp_path / f"{pair.name}.png")
    found = score_maps(maps, pairs, find_map_images(maps, tmp_path, pairs), scorers, {})
    for name in ("mIoU", "accuracy"):
        whole = found.ceilings[name] - found.metrics[name].value
        assert found.metrics[f"{name} shortfall"].value == pytest.approx(whole)
        assert not found.metrics[f"{name} shortfall"].higher_is_better
    for pair in pairs.pairs[3:]:  # of the scenes that have an image, the same scenes
        (tmp_path / f"{pair.name}.png").unlink()
    part = score_maps(maps, pairs, find_map_images(maps, tmp_path, pairs), scorers, {})
    scenes = [read_scene(pair, pairs, 64) for pair in pairs.pairs[:3]]
    segment, labels = scorers["segmenter"].network, np.stack([scene.labels for scene in scenes])
    real = SegmentationScore(23).update(segment([scene.image for scene in scenes]), labels).compute()
    assert part.metrics["mIoU shortfall"].value == pytest.approx(real["miou"] - part.metrics["mIoU"].value)
    clip = scorers["clip"].network
    features = [
        clip.image_features([read_scene(p, pairs, 64).image for p in pairs.pairs[k:m]]) for k, m in ((0, 5), (1, 4))
    ]
    assert part.metrics["CMMD"].value == pytest.approx(clip_distance(*features), rel=1e-5)
    for name in ("FID", "KID", "CMMD"):
        assert part.metrics[name].low <= part.metrics[name].value <= part.metrics[name].high
    (tmp_path / f"{pairs.pairs[0].name}.png").unlink()
    with pytest.raises(UserError, match="2 generated images; intervals of distances need three"):
        score_maps(maps, pairs, find_map_images(maps, tmp_path, pairs), scorers, {})

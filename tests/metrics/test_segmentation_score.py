"""SegmentationScore: against SceneParsing's definition, against torchmetrics, and a case counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import SegmentationScore
from ether_diffusion.metrics.segmentation import class_counts, scores

CLASSES = 9


@pytest.fixture(scope="module")
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, half of them right, and truth, partly unlabelled; class 8 occurs in no truth, class 9 nowhere."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (7, 12, 10), generator=random)
    guesses = torch.randint(0, 9, labels.shape, generator=random)
    return torch.where(torch.rand(labels.shape, generator=random) < 0.5, labels, guesses), labels


def scene_parsing(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The benchmark's definition: areas of intersection and union, by histograms of each image; and pixel accuracy."""
    intersections, unions, right, labelled = np.zeros(CLASSES), np.zeros(CLASSES), 0, 0
    for guess, truth in zip(predicted, labels, strict=True):
        right += int(((guess == truth) & (truth > 0)).sum())
        labelled += int((truth > 0).sum())
        guess = guess * (truth > 0)
        areas = [
            np.histogram(values, bins=CLASSES, range=(1, CLASSES))[0]
            for values in (guess * (guess == truth), guess, truth)
        ]
        intersections += areas[0]
        unions += areas[1] + areas[2] - areas[0]
    return intersections, unions, right / labelled


def test_the_numbers_are_scene_parsings(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = SegmentationScore(CLASSES).update(*maps).compute()
    intersections, unions, accuracy = scene_parsing(maps[0].numpy(), maps[1].numpy())
    iou = intersections / (unions + 1e-10)
    assert found["miou_absent_zero"] == pytest.approx(iou.mean(), abs=1e-9)
    assert found["miou"] == pytest.approx(iou[unions > 0].mean(), abs=1e-9)
    assert found["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["absent_classes"] == [9]
    assert [k for k, value in enumerate(found["iou_per_class"], 1) if math.isnan(value)] == [9]


def test_the_numbers_are_torchmetrics_over_the_whole_set(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = SegmentationScore(CLASSES).update(*maps).compute()
    options = {"num_classes": CLASSES + 1, "ignore_index": 0, "average": "none"}
    iou = multiclass_jaccard_index(*maps, **options)[1:-1]  # pyright: ignore
    recall = multiclass_accuracy(*maps, **options)[1:-2]  # pyright: ignore
    assert torch.tensor(found["iou_per_class"][:-1]) == pytest.approx(iou, abs=1e-6)
    assert found["mean_accuracy"] == pytest.approx(float(recall.mean()), abs=1e-6)


def test_a_case_by_hand() -> None:
    labels = torch.tensor([[[1, 1, 2], [0, 0, 2]]])
    predicted = torch.tensor([[[1, 2, 2], [3, 1, 0]]])
    found = SegmentationScore(4).update(predicted, labels).compute()
    # Class 1: right 1, true 2, predicted 1 (the other one lies on an unlabelled pixel). Class 2: 1, 2, 2.
    assert found["iou_per_class"][:2] == [0.5, pytest.approx(1 / 3)]
    assert found["absent_classes"] == [3, 4]  # 3 was predicted on an unlabelled pixel alone
    assert found["miou"] == pytest.approx(5 / 12)
    assert found["miou_absent_zero"] == pytest.approx(5 / 24)
    assert found["mean_accuracy"] == found["pixel_accuracy"] == 0.5
    assert found["images"] == 1


def test_order_batches_and_processes_change_nothing(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    predicted, labels = maps
    whole = SegmentationScore(CLASSES).update(predicted, labels)
    parts = [SegmentationScore(CLASSES) for _ in range(3)]
    for k in (5, 2, 0, 6, 1, 4, 3):
        parts[k % 3].update(predicted[k : k + 1].numpy().astype(np.uint8), labels[k : k + 1].numpy().astype(np.int16))
    total = SegmentationScore(CLASSES)
    for part in reversed(parts):
        total.merge(part.state())
    assert torch.equal(total.confusion, whole.confusion)
    assert str(total.compute()) == str(whole.compute())


def test_counts_of_images_add_up_to_the_scores_of_the_set(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    counts = class_counts(*maps, num_classes=CLASSES)
    assert counts.shape == (7, 3, CLASSES)
    found = SegmentationScore(CLASSES).update(*maps).compute()
    assert str(scores(*counts.sum(dim=0))) == str({key: value for key, value in found.items() if key != "images"})
    alone = SegmentationScore(CLASSES).update(maps[0][3:4], maps[1][3:4]).compute()
    assert scores(*counts[3])["miou"] == alone["miou"]


def test_invalid_label_maps_are_refused() -> None:
    good = torch.ones(1, 2, 2, dtype=torch.int64)
    for predicted, labels, message in (
        (good, good * 255, r"labels holds 255 to 255; expected 0 \(unlabelled\) to 150"),
        (good - 2, good, "predicted holds -1 to -1"),
        (good.float(), good, r"predicted is torch.float32 .*expected integers \(B, H, W\)"),
        (good[0], good[0], r"expected integers \(B, H, W\)"),
        (good, good[:, :1], r"predicted of shape \(1, 2, 2\) and labels of \(1, 1, 2\) differ"),
    ):
        with pytest.raises(UserError, match=message):
            SegmentationScore().update(predicted, labels)
    with pytest.raises(UserError, match="no labelled pixels"):
        SegmentationScore().update(good, good * 0).compute()
    with pytest.raises(UserError, match="9 classes merged into 150"):
        SegmentationScore().merge(SegmentationScore(9).state())

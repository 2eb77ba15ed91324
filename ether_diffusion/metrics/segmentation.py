"""Agreement of label maps: mIoU, mean accuracy and pixel accuracy over a whole set, as SceneParsing defines them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ether_diffusion.errors import UserError

from .accumulators import State

Maps = Tensor | np.ndarray


class SegmentationScore:
    """Scores of a whole set of label maps: 0 is unlabelled, 1 … C are classes.

    Pixels that are unlabelled in the truth never count; a prediction of 0 on a labelled pixel is a miss.

    Args:
        num_classes: C.

    Attributes:
        confusion: (C, C + 1) int64, pixels by true class (row 0 is class 1) and by prediction (column 0 is 0).
        images: The number of maps seen.
    """

    name = "segmentation"

    def __init__(self, num_classes: int = 150) -> None:
        self.num_classes = num_classes
        self.images = 0
        self.confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, predicted: Maps, labels: Maps) -> Self:
        """Add integer maps (B, H, W). Raises UserError: other shapes or types, or numbers outside 0 … C."""
        predicted, labels = _checked(predicted, labels, self.num_classes)
        self.confusion += _confusion(predicted, labels, self.num_classes)
        self.images += len(labels)
        return self

    def compute(self) -> dict[str, Any]:
        """As `scores`, with `images`. Raises UserError: no labelled pixels."""
        return {**scores(*_counts(self.confusion)), "images": self.images}

    def state(self) -> State:
        """For `merge`, on another process."""
        return {"confusion": self.confusion.clone(), "images": self.images}

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for another number of classes."""
        if state["confusion"].shape != self.confusion.shape:
            raise UserError(f"{self.name}: {len(state['confusion'])} classes merged into {self.num_classes}.")
        self.confusion += state["confusion"]
        self.images += state["images"]
        return self


def class_counts(predicted: Maps, labels: Maps, num_classes: int = 150) -> Tensor:
    """(B, 3, C) int64: for each image and class the pixels that are right, true and predicted, labelled ones alone.

    Their sums over images are the arguments of `scores`; bootstrap intervals resample them.

    Raises:
        UserError: as `SegmentationScore.update`.
    """
    predicted, labels = _checked(predicted, labels, num_classes)
    images = zip(predicted, labels, strict=True)
    return torch.stack([torch.stack(_counts(_confusion(*image, num_classes))) for image in images])


def scores(correct: Tensor, true: Tensor, predicted: Tensor) -> dict[str, Any]:
    """The scores of a set, from its pixels by class, (C,) each: right, true and predicted.

    Returns:
        `miou`: mean over the classes that occur in prediction or truth. `miou_absent_zero`: over all classes, absent
        ones as 0 (CSAIL's). `mean_accuracy`: mean share of right pixels over the classes that occur in the truth.
        `pixel_accuracy`: share of right pixels. `iou_per_class`: C values, nan for absent classes.
        `absent_classes`: the labels of those.

    Raises:
        UserError: no labelled pixels.
    """
    right, true, predicted = correct.double(), true.double(), predicted.double()
    if not true.sum():
        raise UserError("segmentation: no labelled pixels to score.")
    union = true + predicted - right
    iou = right / union  # 0 / 0 is nan
    occurs, in_truth = union > 0, true > 0
    return {
        "miou": float(iou[occurs].mean()),
        "miou_absent_zero": float(iou[occurs].sum() / len(iou)),
        "mean_accuracy": float((right[in_truth] / true[in_truth]).mean()),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "iou_per_class": iou.tolist(),
        "absent_classes": [k + 1 for k, present in enumerate(occurs.tolist()) if not present],
    }


def _confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, C + 1) of checked maps, on the CPU. torchmetrics' takes gigabytes where algorithms are deterministic."""
    counted = labels > 0
    cells = (labels[counted] - 1) * (num_classes + 1) + predicted[counted]
    return torch.bincount(cells, minlength=num_classes * (num_classes + 1)).view(num_classes, num_classes + 1).cpu()


def _counts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) each: the pixels of each class that are right, true and predicted."""
    return confusion[:, 1:].diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)[1:]


def _checked(predicted: Maps, labels: Maps, num_classes: int) -> tuple[Tensor, Tensor]:
    maps = {"predicted": torch.as_tensor(predicted), "labels": torch.as_tensor(labels)}
    for what, one in maps.items():
        if one.is_floating_point() or one.is_complex() or one.dtype == torch.bool or one.ndim != 3:
            raise UserError(f"segmentation: {what} is {one.dtype} {tuple(one.shape)}; expected integers (B, H, W).")
    if maps["predicted"].shape != maps["labels"].shape:
        shapes = " and labels of ".join(str(tuple(one.shape)) for one in maps.values())
        raise UserError(f"segmentation: predicted of shape {shapes} differ.")
    for what, one in maps.items():
        maps[what] = one = one.long()
        if one.numel() and not 0 <= int(one.min()) <= int(one.max()) <= num_classes:
            raise UserError(
                f"segmentation: {what} holds {int(one.min())} to {int(one.max())}; expected 0 (unlabelled) to "
                f"{num_classes}."
            )
    return maps["predicted"].to(maps["labels"].device), maps["labels"]

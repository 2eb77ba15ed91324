"""The scorer that labels every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.figures import mean_iou
from ether_diffusion.tinyworld.render import PALETTE
from ether_diffusion.tinyworld.scoring import full_size, segment

from .rendered import Pictures
from .stage import Stage, batch
from .views import half, side_by_side


def segmenter_stage(
    segmenter: SegformerForSemanticSegmentation, pictures: Pictures, fresh: Pictures, steps: int
) -> Stage:
    """Cross-entropy over labelled pixels."""

    def loss(step: int) -> dict[str, Tensor]:
        chosen = batch("segmenter", step, 16, len(pictures))
        pixels, labels = pictures.images(chosen), pictures.labels(chosen)
        with half(pixels):
            logits = full_size(segmenter, pixels)
        right = (logits.argmax(dim=1) == labels)[labels > 0].float().mean()
        return {"loss": F.cross_entropy(logits.float(), labels, ignore_index=0), "accuracy": right}

    def validate(path: Path) -> dict[str, float]:
        chosen = torch.arange(min(512, len(fresh)))
        predicted = np.concatenate([segment(segmenter, fresh.images(part)).cpu().numpy() for part in chosen.split(64)])
        truth = fresh.labels(chosen).cpu().numpy()
        pixels, labels = fresh.images(torch.arange(16)), fresh.labels(torch.arange(16))
        maps = [_painted(part) for part in (labels, segment(segmenter, pixels))]
        save_png(side_by_side([pixels.cpu(), *maps]), path)
        return {"mIoU on unseen scenes": mean_iou(predicted, truth)}

    return Stage("segmenter", segmenter, loss, validate, steps, learning_rate=1.5e-3, decay=0.995)


def _painted(labels: Tensor) -> Tensor:
    """(B, 3, H, W) in ±1 in the palette's colours."""
    return torch.from_numpy(PALETTE)[labels.cpu()].permute(0, 3, 1, 2) / 127.5 - 1

"""The stages of the scorers: CLIP, a backbone that recognises individuals, a segmenter of every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, SegformerForSemanticSegmentation, ViTModel

from ether_diffusion.tinyworld.figures import mean_iou
from ether_diffusion.tinyworld.phrasing import training_caption
from ether_diffusion.tinyworld.render import PALETTE
from ether_diffusion.tinyworld.scoring import full_size, segment

from .rendered import Pictures
from .stage import Stage, batch, half, save_rows

TEMPERATURE = 0.1


def clip_stage(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, fresh: Pictures, steps: int) -> Stage:
    """CLIP's symmetric cross-entropy (Radford et al. 2021), 128 pairs per step."""

    def pairs(source: Pictures, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        texts = [training_caption(source.scene(int(k)), seed + int(k)) for k in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return source.images(chosen), ids.to(source.device)  # pyright: ignore[reportAttributeAccessIssue]

    def loss(step: int) -> dict[str, Tensor]:
        pixels, ids = pairs(pictures, batch("clip", step, 128, len(pictures)), step * len(pictures))
        with half(pixels):
            logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image.float()
        target = torch.arange(len(logits), device=logits.device)
        hits = (logits.argmax(dim=1) == target).float().mean()
        return {"loss": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, "hits": hits}

    def validate(path: Path) -> dict[str, float]:
        hits = []
        for chosen in torch.arange(min(512, len(fresh))).split(128):
            pixels, ids = pairs(fresh, chosen, 1)
            logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
            hits.append((logits.argmax(dim=1).cpu() == torch.arange(len(chosen))).float().mean())
        return {"right caption of 128, unseen scenes": float(torch.stack(hits).mean())}

    return Stage("clip", clip, loss, validate, steps, learning_rate=1e-3, decay=0.995, weight_decay=0.05)


def backbone_stage(backbone: ViTModel, views: Pictures, fresh: Pictures, steps: int) -> Stage:
    """NT-Xent (Chen et al. 2020): two views of one individual against the views of all others, 128 views per step.

    Args:
        views, fresh: Scenes of `scenes.sample_view`: 2k and 2k + 1 show the same individual in different places.
    """

    def features(source: Pictures, individuals: Tensor) -> Tensor:
        chosen = torch.stack([2 * individuals, 2 * individuals + 1], dim=1).flatten()
        pixels = source.images(chosen)
        with half(pixels):
            hidden = backbone(pixels).last_hidden_state[:, 0]
        return F.normalize(hidden.float(), dim=1)

    def nt_xent(z: Tensor) -> dict[str, Tensor]:
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        target = torch.arange(len(z), device=z.device) ^ 1
        return {"loss": F.cross_entropy(logits, target), "hits": (logits.argmax(dim=1) == target).float().mean()}

    def loss(step: int) -> dict[str, Tensor]:
        return nt_xent(features(views, batch("backbone", step, 64, len(views) // 2)))

    def validate(path: Path) -> dict[str, float]:
        save_rows([fresh.images(torch.arange(view, 32, 2)) for view in (0, 1)], path)
        hits = [nt_xent(features(fresh, k))["hits"] for k in torch.arange(len(fresh) // 2).split(64)]
        return {"same individual of 127 views, unseen": float(torch.stack(hits).mean())}

    return Stage("backbone", backbone, loss, validate, steps, learning_rate=1e-3, decay=0.995, weight_decay=0.05)


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
        maps = [torch.from_numpy(PALETTE[m[:16]]) for m in (fresh.labels(chosen[:16]).cpu().numpy(), predicted)]
        painted = [colours.permute(0, 3, 1, 2) / 127.5 - 1 for colours in maps]
        save_rows([fresh.images(chosen[:16]), *painted], path)
        return {"mIoU on unseen scenes": mean_iou(predicted, fresh.labels(chosen).cpu().numpy())}

    return Stage("segmenter", segmenter, loss, validate, steps, learning_rate=1.5e-3, decay=0.995)

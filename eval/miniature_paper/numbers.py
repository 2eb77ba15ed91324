"""The paper's own numbers that the miniature is shown beside (Bini et al., arXiv 2405.20271), by the methods' names.

A method is named here as in `configs/benchmark/paper_mini.yaml`.
"""

from __future__ import annotations

TITLES = {
    "base": "base, untrained",
    "full": "DreamBooth (full)",
    "none": "encoder only",
    "lora": "LoRA r=4",
    "oft": "OFT n=4",
    "oft_magnitude": "OFT n=4 + magnitudes",
    "naive": "Naive n=4",
    "ether": "ETHER",
    "ether_plus": "ETHER+",
    "ether_plus_one_sided": "ETHER+ one-sided",
}
"""Of the rows and lines."""

STYLES = {"oft": "OFT", "naive": "Naive", "ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA"}
"""Names under which plots know a method's colour; others have their own."""

# Table 2: subject-driven generation; likeness by DINO and CLIP-I, faithfulness by CLIP-T.
TABLE_2: dict[str, dict[str, float]] = {
    "full": {"DINO": 0.644, "CLIP-I": 0.793, "CLIP-T": 0.236},
    "lora": {"DINO": 0.660, "CLIP-I": 0.796, "CLIP-T": 0.231},
    "oft": {"DINO": 0.652, "CLIP-I": 0.794, "CLIP-T": 0.241},
    "naive": {"DINO": 0.648, "CLIP-I": 0.793, "CLIP-T": 0.245},
    "ether": {"DINO": 0.567, "CLIP-I": 0.746, "CLIP-T": 0.256},
    "ether_plus": {"DINO": 0.666, "CLIP-I": 0.800, "CLIP-T": 0.240},
    "ether_plus_one_sided": {"DINO": 0.618, "CLIP-I": 0.777},
}
TABLE_2_REAL = {"DINO": 0.703, "CLIP-I": 0.864}
"""Pairs of two real photos."""

# Table 3: semantic maps to images on ADE20K; mIoU and accuracy in percent.
TABLE_3: dict[str, dict[str, float]] = {
    "none": {"mIoU": 8.2, "accuracy": 38.0, "FID": 41.2},
    "oft": {"mIoU": 24.5, "accuracy": 62.8, "FID": 31.1},
    "oft_magnitude": {"mIoU": 24.6, "accuracy": 63.3, "FID": 30.8},
    "naive": {"mIoU": 24.3, "accuracy": 62.9, "FID": 29.9},
    "ether": {"mIoU": 24.6, "accuracy": 63.3, "FID": 32.0},
    "ether_plus": {"mIoU": 27.3, "accuracy": 68.1, "FID": 31.0},
}

# Fig. 5: mIoU in percent by learning rate.
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MIOU_BY_RATE: dict[str, tuple[float, ...]] = {
    "oft": (7, 24.5, 23.9, 18.6, 12.5, 3.9),
    "naive": (7, 24, 24, 14.4, 0.7, 0),
    "ether": (6.5, 17.6, 24.2, 24.5, 22, 21.5),
    "ether_plus": (7.1, 23.4, 25.1, 27.3, 27.1, 23.3),
}

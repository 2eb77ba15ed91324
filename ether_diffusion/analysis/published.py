"""Published numbers, for comparison: the tables and figures of the paper (Bini et al., arXiv 2405.20271).

Tables are by the names of methods in `configs/benchmark/paper_mini.yaml`; figures are read off, by titles of methods.
"""

from __future__ import annotations

# Table 1: TFLOPs of one backward pass, by method and number of blocks (None: it has none). The paper does not state the
# length of the input. ETHER and ETHER+ follow x + y / n, except Phi-1.5's ETHER with one block.
COSTS: dict[str, dict[str, dict[int | None, float]]] = {
    "phi": {
        "ether": {1: 9.13, 4: 7.07, 32: 6.71},
        "ether_plus": {1: 10.78, 4: 7.69, 32: 6.79},
        "lora": {None: 6.04},
    },
    "llama": {
        "ether": {1: 25.26, 4: 12.07, 32: 8.22},
        "ether_plus": {1: 51.65, 4: 18.66, 32: 9.04},
        "lora": {None: 6.85},
    },
}

# Table 2: subject-driven generation; subject fidelity by DINO and CLIP-I, prompt fidelity by CLIP-T.
TABLE_2: dict[str, dict[str, float]] = {
    "full": {"DINO": 0.644, "CLIP-I": 0.793, "CLIP-T": 0.236},
    "lora": {"DINO": 0.660, "CLIP-I": 0.796, "CLIP-T": 0.231},
    "oft": {"DINO": 0.652, "CLIP-I": 0.794, "CLIP-T": 0.241},
    "naive": {"DINO": 0.648, "CLIP-I": 0.793, "CLIP-T": 0.245},
    "ether": {"DINO": 0.567, "CLIP-I": 0.746, "CLIP-T": 0.256},
    "ether_plus": {"DINO": 0.666, "CLIP-I": 0.800, "CLIP-T": 0.240},
    "ether_plus_one_sided": {"DINO": 0.618, "CLIP-I": 0.777},
}
TABLE_2_LPIPS = (0.709, 0.766)
"""The lowest and the highest of the methods."""
TABLE_2_REAL = {"DINO": 0.703, "CLIP-I": 0.864, "LPIPS": 0.695}
"""Of pairs of two real photos."""

# Table 3: semantic maps to images on ADE20K; mIoU and accuracy in percent.
TABLE_3: dict[str, dict[str, float]] = {
    "none": {"mIoU": 8.2, "accuracy": 38.0, "FID": 41.2},
    "oft": {"mIoU": 24.5, "accuracy": 62.8, "FID": 31.1},
    "oft_magnitude": {"mIoU": 24.6, "accuracy": 63.3, "FID": 30.8},
    "naive": {"mIoU": 24.3, "accuracy": 62.9, "FID": 29.9},
    "ether": {"mIoU": 24.6, "accuracy": 63.3, "FID": 32.0},
    "ether_plus": {"mIoU": 27.3, "accuracy": 68.1, "FID": 31.0},
}
TABLE_3_REAL = {"mIoU": 42.0}
"""Of real images, about: UPerNet-101 by its authors."""

# Fig. 4: mean over layers of ||T - I||_F after training, on Stable Diffusion v1.5, by learning rate.
DISTANCE_RATES = (6e-6, 6e-5, 6e-4, 6e-3, 6e-2, 6e-1)
DISTANCES: dict[str, tuple[float, ...]] = {
    "OFT": (0.1, 0.7, 5, 25, 50, 53),
    "Naive": (0.05, 0.4, 2.6, 28, 220, 720),
    "ETHER": (2, 2, 2, 2, 2, 2),
    "ETHER+": (0.007, 0.07, 0.46, 1.3, 1.4, 1.4),
}

# Fig. 5: mIoU in percent on ADE20K, by learning rate.
MIOU_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MIOU_BY_RATE: dict[str, tuple[float, ...]] = {
    "oft": (7, 24.5, 23.9, 18.6, 12.5, 3.9),
    "naive": (7, 24, 24, 14.4, 0.7, 0),
    "ether": (6.5, 17.6, 24.2, 24.5, 22, 21.5),
    "ether_plus": (7.1, 23.4, 25.1, 27.3, 27.1, 23.3),
}

# Fig. 7: change of hyperspherical energy after 1,400 iterations of DreamBooth on Stable Diffusion v1.5.
ENERGY_CHANGES: dict[str, float] = {"OFT": 0.0, "Naive": 0.0016, "ETHER": 0.0, "ETHER+": 0.0158}

"""The paper's numbers that the analyses are compared with, read off its figures (Bini et al., arXiv 2405.20271)."""

from __future__ import annotations

# Fig. 4: mean over layers of ||T - I||_F after training, on Stable Diffusion v1.5, by learning rate.
DISTANCE_RATES = (6e-6, 6e-5, 6e-4, 6e-3, 6e-2, 6e-1)
DISTANCES: dict[str, tuple[float, ...]] = {
    "OFT": (0.1, 0.7, 5, 25, 50, 53),
    "Naive": (0.05, 0.4, 2.6, 28, 220, 720),
    "ETHER": (2, 2, 2, 2, 2, 2),
    "ETHER+": (0.007, 0.07, 0.46, 1.3, 1.4, 1.4),
}

# Fig. 7: change of hyperspherical energy after 1,400 iterations of DreamBooth on Stable Diffusion v1.5.
ENERGY_CHANGES: dict[str, float] = {"OFT": 0.0, "Naive": 0.0016, "ETHER": 0.0, "ETHER+": 0.0158}

# Table 1: TFLOPs of one backward pass, by method and number of blocks (None: it has none). The input's length is not
# stated. ETHER and ETHER+ follow x + y / n, but for Phi-1.5's ETHER with one block.
COSTS: dict[str, dict[tuple[str, int | None], float]] = {
    "phi": {
        ("ether", 1): 9.13,
        ("ether", 4): 7.07,
        ("ether", 32): 6.71,
        ("ether_plus", 1): 10.78,
        ("ether_plus", 4): 7.69,
        ("ether_plus", 32): 6.79,
        ("lora", None): 6.04,
    },
    "llama": {
        ("ether", 1): 25.26,
        ("ether", 4): 12.07,
        ("ether", 32): 8.22,
        ("ether_plus", 1): 51.65,
        ("ether_plus", 4): 18.66,
        ("ether_plus", 32): 9.04,
        ("lora", None): 6.85,
    },
}

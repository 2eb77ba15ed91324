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

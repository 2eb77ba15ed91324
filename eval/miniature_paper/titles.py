"""How tables and plots show the methods of `configs/benchmark/paper_mini.yaml`."""

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
"""Titles of rows and lines."""

STYLES = {"oft": "OFT", "naive": "Naive", "ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA"}
"""The titles under which plots know a method's colour. Other methods are plotted under their own titles."""

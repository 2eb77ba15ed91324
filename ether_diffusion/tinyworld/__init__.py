"""The miniature: a small rendered world, a Stable Diffusion trained on it, and scorers for its images."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""Folder of the shipped weights: `pipeline/`, `clip/`, `backbone/`, `segmenter/`, the model card and `making.json`."""

"""The miniature: a small drawn world, a Stable Diffusion that knows it, and judges that can see it."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""Folder of the shipped weights: `pipeline/`, `clip/`, `backbone/`, `segmenter/`, the model card and `making.json`."""

"""Trains the miniature's weights from scratch: `python -m ether_diffusion.tinyworld.pretrain --to runs/tinyworld`."""

"""Makes the miniature's weights from nothing: `python -m ether_diffusion.tinyworld.pretrain --to runs/tinyworld`."""

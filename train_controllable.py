"""Train a condition encoder, and an adapter with it, on pairs of image and condition.

accelerate launch train_controllable.py --config configs/controllable/ether_plus.yaml
"""

import sys

from ether_diffusion_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "controllable", *sys.argv[1:]], script="train_controllable.py"))

"""Train a condition encoder and an adapter on pairs of image and condition: `ether-diffusion train controllable`.

accelerate launch train_controllable.py --config configs/controllable/ether_plus.yaml
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("train_controllable.py", "train", "controllable"))

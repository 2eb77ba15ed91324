"""Train an adapter on a few photos of a subject.

accelerate launch train_dreambooth.py --config configs/dreambooth/ether_plus.yaml
"""

import sys

from ether_diffusion_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "dreambooth", *sys.argv[1:]], script="train_dreambooth.py"))

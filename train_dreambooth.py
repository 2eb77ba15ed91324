"""Train an adapter on a few photos of a subject: `ether-diffusion train dreambooth`.

accelerate launch train_dreambooth.py --config configs/dreambooth/ether_plus.yaml
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("train_dreambooth.py", "train", "dreambooth"))

"""A benchmark over learning rates, blocks, sides or other settings, and seeds: `ether-diffusion grid`.

python eval/grid.py --config configs/benchmark/rates_tinyworld.yaml
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/grid.py", "grid"))

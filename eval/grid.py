"""A benchmark along a grid: learning rates, blocks, sides or other settings, and seeds; tables and plots.

python eval/grid.py --config configs/benchmark/rates_tinyworld.yaml
"""

import sys

from ether_diffusion_cli import main

if __name__ == "__main__":
    sys.exit(main(["grid", *sys.argv[1:]], script="eval/grid.py"))

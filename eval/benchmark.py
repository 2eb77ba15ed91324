"""Train, generate and score methods on subjects or maps; then a table: `ether-diffusion benchmark`.

python eval/benchmark.py --config configs/benchmark/tinyworld.yaml
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/benchmark.py", "benchmark"))

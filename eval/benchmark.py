"""A benchmark from end to end: for each method and subject train, draw and score; then a table over the methods.

python eval/benchmark.py --config configs/benchmark/tinyworld.yaml
"""

import sys

from ether_diffusion_cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]], script="eval/benchmark.py"))

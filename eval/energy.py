"""Hyperspherical energy over a training (paper, Fig. 7): `ether-diffusion analyze energy`.

python eval/energy.py RUN…                               # tables, plot and the command, in runs/energy
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/energy.py", "analyze", "energy"))

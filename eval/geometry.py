"""Distances of adapters from the identity and from the base (paper, Fig. 4): `ether-diffusion analyze geometry`.

python eval/geometry.py RUN…                             # tables, plots and the command, in runs/geometry
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/geometry.py", "analyze", "geometry"))

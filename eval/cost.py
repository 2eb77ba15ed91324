"""FLOPs of a forward and a backward pass with each method (paper, Table 1): `ether-diffusion analyze cost`.

python eval/cost.py [phi llama unet] [--tokens 512] [--latents 64]
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/cost.py", "analyze", "cost"))

"""A frozen base under random transforms (paper, Fig. 3): `ether-diffusion analyze perturbation`.

python eval/perturbation.py                              # the miniature, scored by its scorers
python eval/perturbation.py --base-model NAME --prompts FILE
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/perturbation.py", "analyze", "perturbation"))

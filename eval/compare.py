"""Print results of one protocol side by side: `ether-diffusion compare`.

python eval/compare.py RUN/evaluation/PROTOCOL/results.json …
python eval/compare.py --markdown OUTPUT/dreambooth/*/   # the methods of a benchmark, for a document
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/compare.py", "compare"))

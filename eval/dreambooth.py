"""Score runs or images of subjects under a protocol: `ether-diffusion score`.

python eval/dreambooth.py RUN                            # generates the images of the protocol with a run, scores them
python eval/dreambooth.py RUN --all-checkpoints          # every checkpoint, and the Pareto set
python eval/dreambooth.py --images IMAGES --real PHOTOS  # IMAGES/SUBJECT/images.jsonl or IMAGES/SUBJECT/PROMPT/
python eval/dreambooth.py --ceilings --real PHOTOS       # the photos against one another, with the same scorers
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/dreambooth.py", "score"))

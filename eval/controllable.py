"""Score controllable runs or images of label maps under a protocol: `ether-diffusion score`.

python eval/controllable.py RUN                          # generates the scenes of the protocol with a run, scores them
python eval/controllable.py RUN --all-checkpoints        # every checkpoint, and the Pareto set
python eval/controllable.py --images IMAGES --dataset ADEChallengeData2016 --scorer segmenter=FOLDER
"""

import sys

from ether_diffusion_cli import run_script

if __name__ == "__main__":
    sys.exit(run_script("eval/controllable.py", "score"))

"""Metrics against the truth: images with known faults, and how each metric follows their degree, by Kendall's tau.

python eval/metrics_against_truth.py                      # rendered images: table.md, table.csv and a plot; minutes
python eval/metrics_against_truth.py --images OUTPUT/dreambooth/METHOD/images    # also the generated images of the
                                                          # miniature's subjects, with the faults that need no scene
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ether_diffusion_cli import run_quietly

SCRIPT = "eval/metrics_against_truth.py"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images a subject and degree (default: 16)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="SUBJECT/images.jsonl of tinyworld/dreambooth-v1")
    parser.add_argument("--output", type=Path, default=Path("runs/metrics_against_truth"), metavar="DIR")
    return parser.parse_args()


def try_metrics(arguments: argparse.Namespace) -> None:
    """Measure, write and print."""
    from metrics_truth.truth_trial import try_metrics

    command = shlex.join(["python", SCRIPT, *sys.argv[1:]])
    found = try_metrics(arguments.count, arguments.images, arguments.output, command)
    print(f"{found}\nTable, values and plot: {arguments.output}")


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_quietly(SCRIPT, lambda: try_metrics(arguments)))

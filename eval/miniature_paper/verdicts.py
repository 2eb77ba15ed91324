"""The verdicts on the paper's claims, recomputed from the readings next to the page.

python eval/miniature_paper/verdicts.py docs/miniature-paper.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ether_diffusion_cli import run_quietly

SCRIPT = "eval/miniature_paper/verdicts.py"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readings", type=Path, metavar="CSV", help="table, method, unit, seed, metric, value")
    return parser.parse_args()


def print_verdicts(path: Path) -> None:
    """Raises UserError for another file."""
    from miniature_paper.decisions import decide, table
    from miniature_paper.paper_claims import CLAIMS
    from miniature_paper.readings import Readings

    print(table(decide(CLAIMS, Readings.read(path))), end="")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder would hide other modules
    arguments = parse()
    sys.exit(run_quietly(SCRIPT, lambda: print_verdicts(arguments.readings)))

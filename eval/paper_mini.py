"""The miniature paper: the paper's tables and figures in small, each claim with its verdict; in about 75 minutes.

python eval/paper_mini.py             # two processes of one thread each; the same command resumes
python eval/paper_mini.py --quick     # minutes; shows that everything runs
"""

from __future__ import annotations

import argparse
import shlex
import sys

from ether_diffusion_cli import run_quietly

CONFIG = "benchmark/paper_mini"
SCRIPT = "eval/paper_mini.py"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
    parser.add_argument("--quick", action="store_true", help="with the config's `quick` settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser.parse_args()


def write_paper(arguments: argparse.Namespace) -> None:
    """Run the stages that are not done, and write the page."""
    from miniature_paper.config import load_paper
    from miniature_paper.run import run_paper

    config = load_paper(arguments.config, arguments.overrides, quick=arguments.quick)
    print(f"Page: {run_paper(config, shlex.join(['python', SCRIPT, *sys.argv[1:]]))}")


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_quietly(SCRIPT, lambda: write_paper(arguments)))

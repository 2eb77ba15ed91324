"""The miniature paper: the paper's tables and figures in small, each claim with its verdict; in about 75 minutes.

python eval/paper_mini.py             # two processes of one thread each; the same command goes on with what was stopped
python eval/paper_mini.py --quick     # minutes: shows that everything runs, and little else
"""

from __future__ import annotations

import argparse
import sys

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from miniature_paper.config import PaperConfig  # noqa: E402
from miniature_paper.run import run_paper  # noqa: E402

from ether_diffusion.analysis.output import command_line  # noqa: E402
from ether_diffusion.config import load_config  # noqa: E402
from ether_diffusion.errors import exit_code  # noqa: E402

CONFIG = "benchmark/paper_mini"


def main() -> None:
    """Run what is left, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
    parser.add_argument("--quick", action="store_true", help="with the config's `quick` settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    overrides = arguments.overrides
    if arguments.quick:
        stated = load_config(PaperConfig, arguments.config, overrides).quick
        overrides = ["is_quick=true", *stated, *overrides]
    config = load_config(PaperConfig, arguments.config, overrides)
    page = run_paper(config, command_line("eval/paper_mini.py", sys.argv[1:]))
    print(f"Page: {page}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/paper_mini.py", main))

"""Results of one protocol side by side; those that were not measured alike are refused.

python eval/compare.py RUN/evaluation/PROTOCOL/results.json …
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.errors import UserError  # noqa: E402
from ether_diffusion.evaluation.comparison import comparison  # noqa: E402
from ether_diffusion.evaluation.results import Results  # noqa: E402


def main() -> int:
    """Exit code 2 and one line for what cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.json, or its folder")
    try:
        print(comparison({str(path): Results.read(path) for path in parser.parse_args().results}))
    except UserError as error:
        print(f"eval/compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

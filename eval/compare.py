"""Results of one protocol side by side; those that were not measured alike are refused.

python eval/compare.py RUN/evaluation/PROTOCOL/results.json …
python eval/compare.py --markdown OUTPUT/dreambooth/*/          # the methods of a benchmark, for a document
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.errors import exit_code  # noqa: E402
from ether_diffusion.evaluation.comparison import check_comparable, comparison  # noqa: E402
from ether_diffusion.evaluation.results import FILE, Results  # noqa: E402
from ether_diffusion.report.reported_run import short_labels  # noqa: E402
from ether_diffusion.report.score_tables import results_table  # noqa: E402
from ether_diffusion.report.tables import to_markdown  # noqa: E402


def main() -> None:
    """Read, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.json, or its folder")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    arguments = parser.parse_args()
    paths: list[Path] = [path.parent if path.name == FILE else path for path in arguments.results]
    results = {str(path): Results.read(path) for path in paths}
    if arguments.markdown:
        check_comparable(results)
        labels = short_labels([path.resolve() for path in map(Path, results)])
        print(to_markdown([results_table(list(zip(labels, results.values(), strict=True)))]), end="")
    else:
        print(comparison(results))


if __name__ == "__main__":
    sys.exit(exit_code("eval/compare.py", main))

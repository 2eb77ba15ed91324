"""`ether-diffusion compare`: results of one protocol side by side."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "compare",
        run,
        "compare results of one protocol",
        "Print results of one protocol side by side. Results whose protocol, scorers, data or numbers of images differ "
        "are refused.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results.json, or its folder")
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="compare results of different numbers of images, too"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")


def run(arguments: Namespace) -> None:
    """Read, check and print. Raises UserError: results that cannot be read, or cannot be compared."""
    from ether_diffusion.evaluation.comparison import check_comparable, comparison
    from ether_diffusion.evaluation.results import FILE, Results
    from ether_diffusion.report.reported_run import short_labels
    from ether_diffusion.report.score_tables import results_table
    from ether_diffusion.report.tables import to_markdown

    paths: list[Path] = [path.parent if path.name == FILE else path for path in arguments.results]
    results = {str(path): Results.read(path) for path in paths}
    if not arguments.markdown:
        print(comparison(results, allow_incomplete=arguments.allow_incomplete))
        return
    check_comparable(results, allow_incomplete=arguments.allow_incomplete)
    labels = short_labels([path.resolve() for path in map(Path, results)])
    print(to_markdown([results_table(list(zip(labels, results.values(), strict=True)))]), end="")

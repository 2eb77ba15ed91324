"""`ether-diffusion report`: runs and their scores as one HTML page, or as tables."""

from __future__ import annotations

from argparse import Namespace

from .arguments import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "report",
        run,
        "write a page of runs, their images and their scores",
        "Write one self-contained HTML file: settings, losses, images beside the real ones, scores with "
        "their intervals; several runs side by side. Or the tables of scores alone.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a results.json")
    parser.add_argument(
        "--output",
        required=True,
        action="append",
        metavar="FILE",
        help="report.html; a name that ends in .csv, .md or .tex gets the tables alone; may be given several times",
    )


def run(arguments: Namespace) -> None:
    """Write the files, and print their names. Raises UserError as `write_report`."""
    from ether_diffusion.report.page import write_report

    for file in write_report(arguments.runs, arguments.output):
        print(file)

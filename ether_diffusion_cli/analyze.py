"""`ether-diffusion analyze`: what adapters do to a base, and what they cost: tables and plots."""

from __future__ import annotations

from . import analyze_cost, analyze_energy, analyze_geometry, analyze_perturbation
from .arguments import Commands

ANALYSES = (analyze_geometry, analyze_energy, analyze_perturbation, analyze_cost)


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command, with a subcommand for each analysis."""
    parser = commands.add_parser(
        "analyze",
        help="measure what adapters do to a base: tables and plots of the paper's figures",
        description="Measure what adapters do to a base, and what they cost. Each analysis writes tables (CSV), plots "
        "(PNG and SVG) and the command that makes them again.",
    )
    analyses = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for analysis in ANALYSES:
        analysis.add_parser(analyses, prog)

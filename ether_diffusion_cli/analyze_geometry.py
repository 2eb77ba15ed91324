"""`ether-diffusion analyze geometry`: distances of adapters from the identity and from the base (paper, Fig. 4)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands, add_command


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "geometry",
        run,
        summary="distances of transforms from the identity, and of weights from the base's (Fig. 4)",
        description="Measure |T - I| of every transform and |W' - W| of every layer of trained adapters (paper, "
        "Fig. 4). Writes a row a run and a row a layer, plots, and the command.",
        prog=prog,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run, checkpoint or PEFT folders")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/geometry"), metavar="DIR", help="default: runs/geometry"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the double precision (default: cpu)")


def run(arguments: Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: as `write_distances`.
    """
    from ether_diffusion.analysis.analysed_run import labels
    from ether_diffusion.analysis.geometry import write_distances

    rows = write_distances(arguments.runs, arguments.output, arguments.typed, arguments.device)
    names = labels(rows)
    width = max(map(len, names))
    for row, name in zip(rows, names, strict=True):
        print(f"{row['run']:<32} {name:<{width}} |T - I| {row['transform']:8.4g}   |W' - W| {row['weight']:8.4g}")
    print(f"Table and plots: {arguments.output}")

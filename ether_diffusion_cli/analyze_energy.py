"""`ether-diffusion analyze energy`: hyperspherical energy over a training's checkpoints (paper, Fig. 7)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands, add_command, positive

CHUNK = 512


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "energy",
        run,
        summary="change of the hyperspherical energy over a training (Fig. 7)",
        description="Measure the hyperspherical energy of the adapted layers at every checkpoint of runs (paper, "
        "Fig. 7). Writes a row a checkpoint and a row a layer of each, a plot, and the command.",
        prog=prog,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/energy"), metavar="DIR", help="default: runs/energy")
    parser.add_argument("--chunk", type=positive, default=CHUNK, metavar="N", help=f"rows at a time (default: {CHUNK})")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the double precision (default: cpu)")


def run(arguments: Namespace) -> None:
    """Measure, write and print.

    Raises:
        UserError: as `write_energies`.
    """
    from ether_diffusion.analysis.energy import write_energies

    rows = write_energies(arguments.runs, arguments.output, arguments.typed, arguments.chunk, arguments.device)
    for row in rows:
        print(f"{row['run']:<32} {row['method']:<8} step {row['step']:<6} change {row['mean_change']:+.3e}")
    print(f"Table and plot: {arguments.output}")

"""`ether-diffusion analyze cost`: FLOPs of a forward and a backward pass with each method (paper, Table 1)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands, add_command, positive

TOKENS, LATENTS = 512, 64


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "cost",
        run,
        summary="FLOPs of a forward and a backward pass with each method (Table 1)",
        description="Count the FLOPs of a forward and a backward pass with each method (paper, Table 1), on tensors "
        "without memory. Writes a table, a plot and the command.",
        prog=prog,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="phi, llama, unet (default: all)")
    add(
        "--tokens",
        type=positive,
        default=TOKENS,
        metavar="N",
        help=f"in the language models' input (default: {TOKENS})",
    )
    add(
        "--latents",
        type=positive,
        default=LATENTS,
        metavar="N",
        help=f"side of the UNet's latents, a multiple of 8 (default: {LATENTS}, for 512 pixels)",
    )
    add("--output", type=Path, default=Path("runs/cost"), metavar="DIR", help="default: runs/cost")


def run(arguments: Namespace) -> None:
    """Count, write and print.

    Raises:
        UserError: an unknown model, or a size that the UNet does not halve evenly.
    """
    from ether_diffusion.analysis.cost_report import subjects, write_costs
    from ether_diffusion.errors import UserError, did_you_mean

    if arguments.latents % 8:
        raise UserError(f"--latents {arguments.latents}: expected a multiple of 8.")
    known = subjects(arguments.tokens, arguments.latents)
    for name in arguments.models:
        if name not in known:
            raise UserError(f"{name!r}: no such model.{did_you_mean(name, known)} Expected {', '.join(known)}.")
    chosen = {key: subject for key, subject in known.items() if not arguments.models or key in arguments.models}
    print(write_costs(chosen, arguments.output, arguments.typed), end="")
    print(f"Table and plots: {arguments.output}")
